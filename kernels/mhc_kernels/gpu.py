"""Helpers of the Pallas kernels for NVIDIA GPUs (Triton lowering): calls, blocks of tokens and channels, exact products.

A kernel sees whole arrays and cuts its blocks out of them.  `Tile` loads and stores [tokens, channels] blocks, and masks the last
block if it is ragged.  Triton wants sizes that are powers of two, and it can neither slice nor index a value.  So the streams of a
block are a Python list of values, and so are the entries of a small matrix.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from mhc_kernels import backend_choice

# jax 0.11 and 0.12 warn whenever a Triton kernel is lowered.  A user can do nothing about the warning.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

MAX_STREAMS = 8
WARP = 32
VECTOR_BYTES = 16
"""Number of bytes that one thread loads or stores with one instruction."""


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Say why the kernels over streams cannot run a call with n = num_streams and C = width; None means that they can."""
    if not 1 <= num_streams <= MAX_STREAMS:
        return f"n must be 1 to {MAX_STREAMS}, not {num_streams}"
    if width % 16:
        return f"C must be a multiple of 16 (16-byte vectors), not {width}"
    refused = [str(jnp.dtype(d)) for d in dtypes if jnp.dtype(d) not in (jnp.bfloat16, jnp.float32)]
    return f"streams must be bfloat16 or float32, not {refused[0]}" if refused else None


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    out: Sequence[tuple[tuple[int, ...], Any]],
    *args: Array,
    num_warps: int = 4,
    num_stages: int = 1,
) -> list[Array]:
    """Run `kernel` on whole arrays and return its results.

    `out` lists the (shape, dtype) of each result, and `name` is the name of the kernel in the compiled program.  Triton's compiler
    parameters are passed explicitly, because without them jax 0.10 uses the other GPU backend of Pallas.
    """
    axes = jax.typeof(args[0]).manual_axis_type
    run = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in out],
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=backend_choice.interpret(),
        name=name,
    )
    return list(run(*args))


def power_of_two(at_least: int) -> int:
    """Return the smallest power of two that is not smaller than `at_least`."""
    return 1 << max(at_least - 1, 0).bit_length()


def channels(width: int, most: int) -> int:
    """Return the number of channels of a block, a power of two up to `most`.

    It is the largest such number that divides C = `width`, unless that is under 128.  Then it is one that leaves a masked tail,
    because such a divisor would cut rows into pieces shorter than a cache line or two.
    """
    divisor = min(width & -width, most)
    return divisor if divisor >= min(128, most) else min(most, power_of_two(width))


def rounded(a: Array) -> Array:
    """Drop the lower 16 bits of every float32 value, so that the result fits bfloat16 exactly.

    XLA is free to leave out a cast to bfloat16 and back (`xla_allow_excess_precision`), so the bits are masked instead.
    """
    bits = lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-65536)
    return lax.bitcast_convert_type(bits, jnp.float32)


def pieces(a: Array) -> list[Array]:
    """Cut `a` into bfloat16 arrays whose sum is exactly `a`: three arrays if `a` is float32, `a` itself if it is bfloat16."""
    if a.dtype == jnp.bfloat16:
        return [a]
    out = []
    for _ in range(3):
        high = rounded(a)
        out.append(high.astype(jnp.bfloat16))
        a = a - high
    return out


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiply bfloat16 matrices on tensor cores, in float32, summing over axis `contract[0]` of a and `contract[1]` of b."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def split_dot(a: Sequence[Array], b: Sequence[Array], contract: tuple[int, int], terms: int) -> Array:
    """Multiply two matrices that are cut into `pieces`, smallest products first, without those of order 2^(-8 `terms`)."""
    orders = sorted(((i + j, i, j) for i in range(len(a)) for j in range(len(b)) if i + j < terms), reverse=True)
    total = None
    for _, i, j in orders:
        product = dot(a[i], b[j], contract)
        total = product if total is None else total + product
    assert total is not None
    return total


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block [tokens, channels] at (token, channel), in arrays of `num_tokens` rows and C = `width` channels a stream."""

    token: Any
    tokens: int
    num_tokens: Any
    channel: Any = 0
    channels: int = 1
    width: int = 1
    ragged: bool | None = None
    """Whether the last block of tokens is ragged; None means that it is if `tokens` does not divide `num_tokens`."""

    def at(self, channel: Any) -> Tile:
        """Return the block of the same tokens at another channel."""
        return dataclasses.replace(self, channel=channel)

    def inside(self) -> Array | None:
        """Return the mask [tokens] of the tokens that exist, or None if no block of tokens is ragged."""
        if not (self.num_tokens % self.tokens if self.ragged is None else self.ragged):
            return None
        return self.token + lax.broadcasted_iota(jnp.int32, (self.tokens,), 0) < self.num_tokens

    def _mask(self) -> Array | None:
        rows = self.inside()
        rows = None if rows is None else rows[:, None]
        if self.width % self.channels:
            columns = self.channel + lax.broadcasted_iota(jnp.int32, (1, self.channels), 1) < self.width
            rows = columns if rows is None else rows & columns
        return None if rows is None else jnp.broadcast_to(rows, (self.tokens, self.channels))

    def load(self, ref: Any, stream: Any = 0) -> Array:
        """Load this block of a stream, in the dtype of the array, with zeros for tokens and channels that do not exist."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        mask = self._mask()
        return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)

    def load32(self, ref: Any, stream: Any = 0) -> Array:
        """Load this block of a stream as `load` does, and convert it to float32."""
        return self.load(ref, stream).astype(jnp.float32)

    def store(self, ref: Any, value: Array, stream: Any = 0) -> None:
        """Store `value` as this block of a stream, rounded to the dtype of the array."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=self._mask())

    def column(self, ref: Any, *index: Any) -> Array:
        """Load one coefficient, chosen by `index`, of each token of the block: [tokens], float32, zeros for missing tokens."""
        mask = self.inside()
        return plgpu.load(self._column(ref, index), mask=mask, other=None if mask is None else 0.0)

    def store_column(self, ref: Any, value: Array, *index: Any) -> None:
        """Store one coefficient, chosen by `index`, of each token of the block; `value` is [tokens]."""
        plgpu.store(self._column(ref, index), value, mask=self.inside())

    def _column(self, ref: Any, index: Sequence[Any]) -> Any:
        # The interpreter of jax 0.10 does not take a Python integer here.
        indices = (np.int32(i) if isinstance(i, int) else i for i in index)
        return ref.at[(*indices, pl.ds(self.token, self.tokens))]


def rows(width: int, n: int, dtype: Any, warps: int) -> tuple[int, int]:
    """Return the numbers of tokens and channels of a block, so that a thread holds one vector of each stream, or two if n <= 2.

    A block has at most 256 channels, so that a warp holds whole rows and sums them by shuffles.
    """
    vector = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    elements = warps * WARP * (2 * vector if n <= 2 else vector)
    wide = channels(width, 256)
    return max(elements // wide, 1), wide
