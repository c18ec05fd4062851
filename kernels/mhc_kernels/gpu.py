"""Helpers of the Pallas kernels for NVIDIA GPUs (Triton lowering): calls, tiles of tokens and channels, exact products.

A kernel receives references to whole arrays.  Each program of its grid works on tiles, which are pieces [tokens, channels] of one
stream.  `Tile` loads and stores a tile, and masks the part that lies outside the array.  In Triton, sizes must be powers of two,
and a loaded value can be neither sliced nor indexed.  So kernels hold the n streams of some tokens as a Python list of n values,
and the entries of a small matrix as a list, too.
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

# jax 0.11 and 0.12 warn whenever a Triton kernel is lowered.  A user can do nothing about the warning, so it is hidden.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

MAX_STREAMS = 8
WARP = 32
VECTOR_BYTES = 16
"""Number of bytes that one thread loads or stores with one instruction."""


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernels over streams cannot run a call with n = num_streams and C = width, or None if they can."""
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
    """Run `kernel` on the arrays `args`, and return its results.

    `name` is the name of the kernel in the compiled program, `grid` is the number of programs along each axis, and `out` has the
    (shape, dtype) of each result.  Triton's compiler parameters are passed explicitly, because without them jax 0.10 uses the
    other GPU backend of Pallas (Mosaic GPU).
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
    """Return the number of channels of a tile, a power of two up to `most`.

    It is the largest power of two up to `most` that divides C = `width`, if that is at least 128 or `most`.  A smaller divisor
    would cut rows into pieces shorter than one or two cache lines.  So the result is then `most`, or the next power of two from C
    on if that is smaller, and the last tile of a row is masked.
    """
    divisor = min(width & -width, most)
    return divisor if divisor >= min(128, most) else min(most, power_of_two(width))


def rounded(a: Array) -> Array:
    """Set the lower 16 bits of every float32 value to 0, so that the result fits bfloat16 exactly.

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
    """Multiply bfloat16 matrices on tensor cores, contracting axis `contract[0]` of a with axis `contract[1]` of b in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def split_dot(a: Sequence[Array], b: Sequence[Array], contract: tuple[int, int], terms: int) -> Array:
    """Multiply two matrices, given as the lists a and b of their `pieces`, and return the product in float32.

    The products of single pieces are added from the smallest to the largest.  Those of piece i of a and piece j of b with
    i + j >= `terms` are left out; their size is about 2^(-8 `terms`) of the product.
    """
    orders = sorted(((i + j, i, j) for i in range(len(a)) for j in range(len(b)) if i + j < terms), reverse=True)
    total = None
    for _, i, j in orders:
        product = dot(a[i], b[j], contract)
        total = product if total is None else total + product
    assert total is not None
    return total


@dataclasses.dataclass(frozen=True)
class Tile:
    """A piece [tokens, channels] of a stream, which begins at row `token` and at channel `channel` of the stream.

    The arrays that it is cut out of have `num_tokens` rows, and each of their streams has C = `width` channels.
    """

    token: Any
    tokens: int
    num_tokens: Any
    channel: Any = 0
    channels: int = 1
    width: int = 1
    ragged: bool | None = None
    """Whether some tile reaches beyond the last token; None means that one does if `tokens` does not divide `num_tokens`."""

    def at(self, channel: Any) -> Tile:
        """Return the tile of the same tokens that begins at channel `channel`."""
        return dataclasses.replace(self, channel=channel)

    def inside(self) -> Array | None:
        """Return a mask [tokens] that is true for tokens that exist, or None if no tile reaches beyond the last token."""
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
        """Load this tile of stream number `stream` of `ref`, in the dtype of `ref`, with zeros outside the stream."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        mask = self._mask()
        return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)

    def load32(self, ref: Any, stream: Any = 0) -> Array:
        """Load this tile of stream number `stream` of `ref` as `load` does, and convert it to float32."""
        return self.load(ref, stream).astype(jnp.float32)

    def store(self, ref: Any, value: Array, stream: Any = 0) -> None:
        """Store `value` [tokens, channels] in this tile of stream number `stream` of `ref`, rounded to the dtype of `ref`."""
        index = pl.ds(self.token, self.tokens), pl.ds(stream * self.width + self.channel, self.channels)
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=self._mask())

    def column(self, ref: Any, *index: Any) -> Array:
        """Load ref[*index] at the tokens of this tile, where `ref` has tokens last: [tokens], zeros for missing tokens."""
        mask = self.inside()
        return plgpu.load(self._column(ref, index), mask=mask, other=None if mask is None else 0.0)

    def store_column(self, ref: Any, value: Array, *index: Any) -> None:
        """Store `value` [tokens] in ref[*index] at the tokens of this tile, where `ref` has tokens last."""
        plgpu.store(self._column(ref, index), value, mask=self.inside())

    def _column(self, ref: Any, index: Sequence[Any]) -> Any:
        # Pallas' interpreter in jax 0.10 does not take a Python integer as an index.
        indices = (np.int32(i) if isinstance(i, int) else i for i in index)
        return ref.at[(*indices, pl.ds(self.token, self.tokens))]


def rows(width: int, n: int, dtype: Any, warps: int) -> tuple[int, int]:
    """Return the numbers of tokens and channels of a tile for a program of `warps` warps; C is `width`.

    The tile is so large that each thread holds one 16-byte vector of each stream, or two if n <= 2.  It has at most 256 channels,
    so that a warp holds whole rows of the tile, and sums a row by shuffles between its threads.
    """
    vector = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    elements = warps * WARP * (2 * vector if n <= 2 else vector)
    wide = channels(width, 256)
    return max(elements // wide, 1), wide
