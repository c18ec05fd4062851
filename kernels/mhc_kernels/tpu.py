"""Helpers of the Pallas TPU (Mosaic) kernels: blocks of tokens, use of VMEM, and the layout of coefficients.

A kernel works on one block of tokens at a time, with all channels of these tokens.  Coefficients are arrays `[k, N]` in HBM: k
numbers for each of N tokens, with the tokens on the lanes.  An array `[N, k]` would be padded to 128 lanes.  But inside a kernel,
coefficients must have tokens on the sublanes, as streams have.  So `call` transposes the coefficients of a block in VMEM on the way
in and out, and the padded form never reaches HBM.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mhc_kernels import backend_choice

LANES = 128
MAX_STREAMS = 8
SMALLEST_VMEM = 64 * 2**20
"""Bytes of VMEM of v5p and TPU7x, assumed if no TPU is present (ahead-of-time compilation); v5e and v6e have 128 MiB."""
STEP_BYTES = 4 * 2**20
"""Bytes of HBM traffic in one grid step from which on a larger block of tokens does not make a kernel faster.

A v5p moves these bytes in 1.5 us, and each grid step costs another 0.35 us.
"""


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any], per_token: int = 0, resident: int = 0) -> str | None:
    """Return why the kernels cannot run a call with n = num_streams and C = width, or None if they can.

    `per_token` and `resident` are bytes of VMEM, as in `block_tokens`.
    """
    if not 1 <= num_streams <= MAX_STREAMS:
        return f"it needs 1 to {MAX_STREAMS} streams, n is {num_streams}"
    if width % LANES:
        return f"C must be a multiple of {LANES}, it is {width}"
    if not all(jnp.dtype(d) in (jnp.bfloat16, jnp.float32) for d in dtypes):
        return f"streams must be bfloat16 or float32, not {', '.join(str(jnp.dtype(d)) for d in dtypes)}"
    if block_tokens(LANES, 0, per_token, resident) is None:
        least = (resident + 16 * per_token) / 2**20
        return f"16 tokens need {least:.0f} MiB of VMEM, more than the {vmem_budget() / 2**20:.0f} MiB there are"
    return None


def vmem_budget() -> int:
    """Return the bytes of VMEM that a kernel may use: 7/8 of a core's VMEM.  The rest is left to the compiler."""
    on_tpu = jax.default_backend() == "tpu"
    return (pltpu.get_tpu_info().vmem_capacity_bytes if on_tpu else SMALLEST_VMEM) * 7 // 8


def block_tokens(tokens: int, traffic: int, per_token: int, resident: int) -> int | None:
    """Return the number of tokens of a kernel's block, which `STEP_BYTES` and the size of VMEM limit.

    Args:
      tokens: N, a multiple of 128.
      traffic: bytes that move between HBM and VMEM for each token.
      per_token: bytes of VMEM that each token needs, in both buffers of every array that is double-buffered.
      resident: bytes of VMEM that a kernel needs for a block of any size.

    Returns:
      512, 256 or 128, which divides N, or a fraction of 128 (64, 32 or 16); None if VMEM does not hold 16 tokens.
    """
    for block in (512, 256, 128, 64, 32, 16):
        wasteful = block > LANES and (tokens % block or block * traffic > STEP_BYTES)
        if not wasteful and block * per_token + resident <= vmem_budget():
            return block
    return None


def up(size: int, multiple: int) -> int:
    """Round `size` up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


def pieces(a: Array, which: Sequence[int], axis: int) -> Array:
    """Cut float32 `a` into pieces that fit bfloat16, so that the MXU multiplies them exactly; the three pieces add up to `a`.

    Piece 0 has the leading 8 bits of each value, piece 1 the next 8, and piece 2 the last 8.  The result has the pieces `which`, in
    this order, one after another along `axis`.  `reduce_precision` makes the pieces, because XLA is free to drop a cast to bfloat16
    and back.
    """
    parts, rest = [], a
    for _ in range(3):
        parts.append(lax.reduce_precision(rest, 8, 7))
        rest = rest - parts[-1]
    return jnp.concatenate([parts[k] for k in which], axis)


def rounded(a: Array) -> Array:
    """Round float32 `a` to the precision of bfloat16 inside a kernel.  Mosaic keeps both casts, and has no `reduce_precision`."""
    if backend_choice.interpret():
        return lax.reduce_precision(a, 8, 7)
    return a.astype(jnp.bfloat16).astype(jnp.float32)


def pad(a: Array, size: int, axis: int) -> Array:
    """Append zeros along `axis` until it has `size` entries."""
    widths = [(0, size - s if k == axis else 0) for k, s in enumerate(a.shape)]
    return a if size == a.shape[axis] else jnp.pad(a, widths)


def manual_axes(*arrays: Array) -> Any:
    """Return the `manual_axis_type` of a result that varies over every mesh axis over which any of the arrays varies.

    `jax.shard_map` with `check_vma` needs this type for the results of a kernel.
    """
    types = [jax.typeof(a).manual_axis_type for a in arrays]
    return types[0].update(varying=frozenset().union(*(t.varying for t in types)))


def call(
    kernel: Callable[..., None],
    name: str,
    *,
    numbers: Sequence[Array],
    streams: Sequence[Array],
    whole: Sequence[Array] = (),
    out_streams: Sequence[int] = (),
    out_numbers: int = 0,
    out_sum: tuple[int, int] | None = None,
    scratch: Sequence[tuple[int, Any]] = (),
    flops: int,
    transcendentals: int = 0,
) -> list[Array]:
    """Run a kernel over all blocks of tokens, and return its outputs.

    Args:
      kernel: function that processes one block.  It is called as kernel(numbers, *streams, *whole, *out_streams, out_numbers,
        out_sum, *scratch) with references; a reference that the other arguments do not ask for is left out.  `numbers` [block, k]
        and `out_numbers` [block, out_numbers] have the tokens first.  `out_sum` starts at zero, and the kernel adds to it.
      name: name of the kernel in the compiled program.
      numbers: float32 arrays [k, N], such as coefficients; the kernel gets all their rows as the columns of one array.
      streams: arrays [N, width] of one dtype.
      whole: small arrays without tokens, which stay in VMEM.
      out_streams: widths of outputs [N, width] in the dtype of the streams.
      out_numbers: number of rows of a float32 output [out_numbers, N]; 0 means no such output.
      out_sum: shape of a float32 output that is a sum over tokens, added up in a fixed order; None means no such output.
      scratch: width and dtype of each scratch array [block, width] in VMEM.
      flops: number of floating-point operations for each token.
      transcendentals: number of exponentials and roots for each token.

    Returns:
      Outputs in the order of `out_streams`, `out_numbers`, `out_sum`.
    """
    N, dtype = streams[0].shape[0], streams[0].dtype
    mat = manual_axes(*streams, *numbers, *whole)
    k = up(sum(a.shape[0] for a in numbers), 8)
    k_out = up(out_numbers, 8)
    width = sum(a.shape[1] for a in streams) + sum(out_streams)
    traffic = width * dtype.itemsize + 4 * (k + k_out)
    per_token = 2 * traffic + 4 * (up(k, LANES) + up(k_out, LANES))
    per_token += sum(up(w, LANES) * jnp.dtype(d).itemsize for w, d in scratch)
    resident = sum(up(a.shape[0], 16) * a.shape[1] * a.dtype.itemsize for a in whole)
    resident += 4 * math.prod(out_sum) if out_sum else 0
    padded = up(N, LANES)
    block = block_tokens(padded, traffic, per_token, resident)
    if block is None:
        raise ValueError(f"{name}: VMEM does not hold 16 tokens of {width} numbers and {resident} bytes of parameters.")
    lanes = max(block, LANES)  # number of tokens whose coefficients are loaded together
    steps = lanes // block
    blocks = padded // lanes
    cores = 2 if blocks % 2 == 0 else 1  # each of the two cores of a v5p has its own sum
    grid = (cores, blocks // cores, steps)

    def of_streams(w):
        return pl.BlockSpec((block, w), lambda p, t, s: ((p * grid[1] + t) * steps + s, 0))

    def of_numbers(rows):
        return pl.BlockSpec((rows, lanes), lambda p, t, s: (0, p * grid[1] + t))

    in_specs = [of_numbers(k)] if k else []
    in_specs += [of_streams(a.shape[1]) for a in streams]
    in_specs += [pl.BlockSpec(a.shape, lambda p, t, s: (0, 0), pipeline_mode=pl.Buffered(1)) for a in whole]
    out_specs = [of_streams(w) for w in out_streams]
    struct = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=mat)
    out_shape = [struct((padded, w), dtype) for w in out_streams]
    scratch_shapes = [pltpu.VMEM((lanes, k), jnp.float32)] if k else []
    if k_out:
        out_specs.append(of_numbers(k_out))
        out_shape.append(struct((k_out, padded), jnp.float32))
        scratch_shapes.append(pltpu.VMEM((lanes, k_out), jnp.float32))
    if out_sum:
        out_specs.append(pl.BlockSpec((1, *out_sum), lambda p, t, s: (p, 0, 0), pipeline_mode=pl.Buffered(1)))
        out_shape.append(struct((cores, *out_sum), jnp.float32))
    scratch_shapes += [pltpu.VMEM((block, w), d) for w, d in scratch]

    def body(*refs):
        t, s = pl.program_id(1), pl.program_id(2)
        here = pl.ds(pl.multiple_of(s * block, block), block)
        ins, outs = list(refs[: len(in_specs)]), refs[len(in_specs) :][: len(out_specs)]
        scratches = list(refs[len(in_specs) + len(out_specs) :])
        args = []
        if k:
            incoming, turned = ins.pop(0), scratches.pop(0)

            @pl.when(s == 0)
            def _():
                turned[...] = incoming[...].T

            args.append(turned.at[here])
        args += [*ins, *outs[: len(out_streams)]]
        rest = outs[len(out_streams) :]
        if k_out:
            args.append(scratches[0].at[here])
        if out_sum:

            @pl.when((t == 0) & (s == 0))
            def _():
                rest[-1][...] = jnp.zeros_like(rest[-1])

            args.append(rest[-1].at[0])
        kernel(*args, *scratches[bool(k_out) :])
        if k_out:

            @pl.when(s == steps - 1)
            def _():
                rest[0][...] = scratches[0][...].T

    operands = [pad(pad(jnp.concatenate(numbers), k, 0), padded, 1)] if k else []
    operands += [pad(a, padded, 0) for a in streams] + list(whole)
    moved = sum(a.size * a.dtype.itemsize for a in operands)
    moved += sum(math.prod(a.shape) * a.dtype.itemsize for a in out_shape)
    outs = pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=min(vmem_budget(), block * per_token + resident + 16 * 2**20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * padded, bytes_accessed=moved, transcendentals=transcendentals * padded
        ),
        interpret=backend_choice.interpret(),
        name=name,
    )(*operands)
    results = [a[:N] for a in outs[: len(out_streams)]]
    if k_out:
        results.append(outs[len(out_streams)][:out_numbers, :N])
    if out_sum:
        results.append(outs[-1].sum(0))
    return results


def for_rows(ref: Any, body: Callable[[Any, int], None]) -> None:
    """Call body(rows, R) for every R tokens of the block `ref` [tokens, channels]; `rows` is the slice of these tokens.

    R tokens fill the sublanes of a register: 16 tokens in bfloat16, 8 in float32.
    """
    R = 32 // ref.dtype.itemsize

    def step(r, _):
        body(pl.ds(pl.multiple_of(r * R, R), R), R)
        return 0

    lax.fori_loop(0, ref.shape[0] // R, step, 0)


class Channels(NamedTuple):
    """The position of 128 channels in a stream: they begin at channel `base` + `at`.

    `base` is a traced number: the first of the `width` channels that one pass of the loop in `for_channels` handles.  `at` is a
    constant.  Scalar arithmetic limits the speed of a kernel that computes little.  So an address is computed from `base` once in
    each pass, and `at` is a constant in the instructions that load and store.
    """

    base: Array
    width: int
    at: int


def for_channels(C: int, body: Callable[[Channels, Any], Any], carry: Any, most: int = 10) -> Any:
    """Run carry = body(channels, carry) for every 128 of the C channels of a stream, and return the last carry.

    The loop is unrolled up to `most` times.
    """
    steps = C // LANES
    unroll = max(u for u in range(1, most + 1) if steps % u == 0)
    width = unroll * LANES

    def step(s, carry):
        base = pl.multiple_of(s * width, width)
        for u in range(unroll):
            carry = body(Channels(base, width, u * LANES), carry)
        return carry

    return lax.fori_loop(0, steps // unroll, step, carry)


def piece(ref: Any, rows: Any, first: int, c: Channels) -> Array:
    """Load the 128 channels c of the tokens `rows` as float32; `first` is the column of `ref` at which the stream begins."""
    return ref.at[rows, pl.ds(first + c.base, c.width)][:, c.at : c.at + LANES].astype(jnp.float32)


def put(ref: Any, rows: Any, first: int, c: Channels, value: Array) -> None:
    """Round `value` to the dtype of `ref`, and store it at the place from which `piece` loads with the same arguments."""
    ref.at[rows, pl.ds(first + c.base, c.width)][:, c.at : c.at + LANES] = value.astype(ref.dtype)


def add(terms: Iterable[Array]) -> Array:
    """Return the sum of the terms, without the 0 that Python's `sum` starts from."""
    return functools.reduce(jnp.add, terms)


def dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Multiply two matrices, contracting axis `of_a` of a with axis `of_b` of b, and return the product in float32.

    Products of bfloat16 numbers are exact.  Float32 matrices are multiplied with precision HIGHEST.
    """
    if backend_choice.interpret():  # for some shapes, XLA:CPU cannot multiply bfloat16 to float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def column(numbers: Array, k: int) -> Array:
    """Return column k of `numbers` [tokens, columns], repeated over the lanes of a register: [tokens, 128]."""
    return jnp.broadcast_to(numbers[:, k : k + 1], (numbers.shape[0], LANES))


def put_sums(out: Any, rows: Any, sums: Sequence[Array], first: int = 0) -> None:
    """Sum each array of `sums` [tokens, 128] over its lanes, and store the sums in the columns of `out` from `first` on."""
    for k, a in enumerate(sums, first):
        out[rows, k : k + 1] = jnp.sum(a, axis=1, keepdims=True)
