"""Shared by the Pallas kernels for NVIDIA GPUs (Triton lowering): the call, blocks over tokens and channels, exact splits.

A kernel sees whole arrays and cuts its blocks out itself: `Tile` loads and stores [tokens, channels] blocks with the ragged
last block masked.  Triton wants powers of two, cannot slice a value and cannot index one, so the streams of a block and the
entries of a small matrix are Python lists of values.
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

from mhc_kernels import choice

# jax 0.11 and 0.12 say so at every lowering of a Triton kernel, in the user's own program.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

MAX_STREAMS = 8
WARP = 32
VECTOR_BYTES = 16
"""What one thread loads or stores at once."""


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Why the kernels over streams cannot run a call with n = num_streams and C = width."""
    if not 1 <= num_streams <= MAX_STREAMS:
        return f"n must be 1 to {MAX_STREAMS}, not {num_streams}"
    if width % 16:
        return f"C must be a multiple of 16 (16-byte vectors), not {width}"
    other = [str(jnp.dtype(d)) for d in dtypes if jnp.dtype(d) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))]
    return f"streams must be bfloat16 or float32, not {other[0]}" if other else None


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    out: Sequence[tuple[tuple[int, ...], Any]],
    *args: Array,
    num_warps: int = 4,
    num_stages: int = 1,
) -> list[Array]:
    """Run `kernel` on whole arrays; `out` lists (shape, dtype) of the results, `name` is what the compiled program calls it.

    Triton's parameters are given explicitly: without them jax 0.10 takes its other GPU backend.
    """
    axes = jax.typeof(args[0]).manual_axis_type
    run = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in out],
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=choice.interpret(),
        name=name,
    )
    return list(run(*args))


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(at_least - 1, 0).bit_length()


def channels(width: int, most: int) -> int:
    """Channels of a block: the largest power of two up to `most` that divides C, or one that leaves a masked tail.

    A divisor under 128 would cut rows into pieces shorter than a cache line or two.
    """
    divisor = min(width & -width, most)
    return divisor if divisor >= min(128, most) else min(most, power_of_two(width))


def rounded(a: Array) -> Array:
    """Float32 with the lower 16 bits of every value dropped: a bfloat16, exactly.

    By bits, not by a cast there and back, which XLA is free to leave out (`xla_allow_excess_precision`).
    """
    bits = lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-65536)
    return lax.bitcast_convert_type(bits, jnp.float32)


def pieces(a: Array, count: int = 3) -> list[Array]:
    """bfloat16 arrays that sum to `a`: exactly with 3 of them, to 2^-15 of it with 2 (bfloat16 `a`: itself)."""
    if a.dtype == jnp.bfloat16:
        return [a]
    out = []
    for _ in range(count):
        high = rounded(a)
        out.append(high.astype(jnp.bfloat16))
        a = a - high
    return out


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """bfloat16 x bfloat16 -> float32 on tensor cores, over the axes `contract`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def split_dot(a: Sequence[Array], b: Sequence[Array], contract: tuple[int, int], terms: int) -> Array:
    """Product of two numbers given as `pieces`, smallest terms first; products of order 2^-8 `terms` are left out."""
    orders = sorted(((i + j, i, j) for i in range(len(a)) for j in range(len(b)) if i + j < terms), reverse=True)
    total = None
    for _, i, j in orders:
        product = dot(a[i], b[j], contract)
        total = product if total is None else total + product
    assert total is not None
    return total


@dataclasses.dataclass(frozen=True)
class Tile:
    """A [tokens, channels] block at (token, channel) of arrays with `num_tokens` rows and C = `width` channels a stream."""

    token: Any
    tokens: int
    num_tokens: Any
    channel: Any = 0
    channels: int = 1
    width: int = 1
    ragged: bool | None = None
    """Whether the last block of tokens is; None: it is where `tokens` does not divide `num_tokens`."""

    def at(self, channel: Any) -> Tile:
        """The same tokens at another channel."""
        return dataclasses.replace(self, channel=channel)

    def inside(self) -> Array | None:
        """[tokens]; None where no block is ragged."""
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
        """[tokens, channels] of stream `stream`, in the dtype of the array; zeros outside."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        mask = self._mask()
        return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)

    def load32(self, ref: Any, stream: Any = 0) -> Array:
        """`load` as float32."""
        return self.load(ref, stream).astype(jnp.float32)

    def store(self, ref: Any, value: Array, stream: Any = 0) -> None:
        """Write a block, rounded to the dtype of the array."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=self._mask())

    def column(self, ref: Any, *index: Any) -> Array:
        """[tokens] float32 of a coefficient array with tokens last; zeros outside."""
        mask = self.inside()
        return plgpu.load(self._column(ref, index), mask=mask, other=None if mask is None else 0.0)

    def store_column(self, ref: Any, value: Array, *index: Any) -> None:
        """Write [tokens] of a coefficient array."""
        plgpu.store(self._column(ref, index), value, mask=self.inside())

    def _column(self, ref: Any, index: Sequence[Any]) -> Any:
        # The interpreter of jax 0.10 does not take a Python integer here.
        known = (np.int32(i) if isinstance(i, int) else i for i in index)
        return ref.at[(*known, pl.ds(self.token, self.tokens))]


def rows(width: int, n: int, dtype: Any, warps: int) -> tuple[int, int]:
    """Tokens and channels of a block of which a thread holds one vector a stream, or two where n is small.

    At most 256 channels, so that a warp holds whole rows and sums them by shuffles.
    """
    vector = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    elements = warps * WARP * (2 * vector if n <= 2 else vector)
    wide = channels(width, 256)
    return max(elements // wide, 1), wide
