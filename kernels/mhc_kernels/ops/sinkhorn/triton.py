"""Sinkhorn-Knopp on NVIDIA GPUs through jax-triton, which runs only if a caller names this backend.

It is kept for the time after Pallas drops its Triton lowering.  jax-triton 0.3.1 works with jax 0.10 (Python 3.11).
jax-triton 0.4 needs jax 0.11, and its kernels do not lower with jax 0.12.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_kernels import backend_choice
from mhc_kernels.ops.sinkhorn import pallas_gpu
from mhc_kernels.ops.sinkhorn.pallas_gpu import padded, tokens
from mhc_kernels.ops.sinkhorn.steps import pairs_left


def obstacle(num_streams: int, width: int, dtypes: Sequence[Any]) -> str | None:
    """Return why the kernel cannot run a call (a missing package, interpret mode, n too large), or None if it can."""
    try:
        importlib.import_module("jax_triton")
        importlib.import_module("triton")
    except ImportError as error:
        return f"it needs jax-triton and triton, pip install jax-triton triton ({str(error).splitlines()[0]})"
    if backend_choice.interpret():
        return "jax-triton kernels cannot be interpreted"
    return pallas_gpu.obstacle(num_streams, width, dtypes)


def _call(name: str, n: int, num_iters: int, eps: float, *args: Array) -> Array:
    """Run the kernel `name` of `triton_sinkhorn.py` on arrays [size, size, N], and return its result [n, n, N].

    `size` is the power of two to which n is padded.  Under `jax.vmap`, the mapped axis is merged with the tokens.
    """
    import jax_triton

    from mhc_kernels import triton_sinkhorn

    @jax.custom_batching.custom_vmap
    def run(*args: Array) -> Array:
        size, _, N = args[0].shape
        block = tokens(n)
        return jax_triton.triton_call(
            *args,
            kernel=getattr(triton_sinkhorn, name),
            out_shape=jax.ShapeDtypeStruct(args[0].shape, jnp.float32),
            grid=(pl.cdiv(N, block),),
            num_warps=1,
            num_stages=1,
            # On a host without a GPU, the kernel is compiled for compute capability 9.0.
            compute_capability=None if jax.default_backend() == "gpu" else 90,
            N=N,
            n=size,
            real=n,
            TOKENS=block,
            pairs=pairs_left(num_iters, eps),
            eps=float(eps),
        )

    @run.def_vmap
    def _(axis_size: int, in_batched: Sequence[bool], *args: Array) -> tuple[Array, bool]:
        pairs = zip(args, in_batched, strict=True)
        full = [a if b else jnp.broadcast_to(a, (axis_size, *a.shape)) for a, b in pairs]
        out = run(*(jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1) for a in full))
        return jnp.moveaxis(out.reshape(*out.shape[:2], axis_size, -1), 2, 0), True

    out = run(*args)[:n, :n]
    # The result of `triton_call` lacks the type which says that it varies between shards of `jax.shard_map`.  `pcast` restores it.
    axes = tuple(jax.typeof(args[0]).manual_axis_type.varying - jax.typeof(out).manual_axis_type.varying)
    return lax.pcast(out, axes, to="varying") if axes else out


def forward(logits: Float[Array, "n n N"], num_iters: int, eps: float) -> Float[Array, "n n N"]:
    """Return H_res = SK(logits), the result of the Sinkhorn iterations, in float32."""
    return _call("mhc_sinkhorn_forward", logits.shape[0], num_iters, eps, padded(logits, 0.0, -jnp.inf))


def backward(
    logits: Float[Array, "n n N"], g: Float[Array, "n n N"], num_iters: int, eps: float
) -> Float[Array, "n n N"]:
    """Return the gradient of the logits through the num_iters iterations, where `g` is the gradient of H_res.

    Memory traffic per token: reads 2 n^2, writes n^2 float32 numbers.
    """
    args = padded(logits, 0.0, -jnp.inf), padded(g, 0.0, 0.0)
    return _call("mhc_sinkhorn_backward", logits.shape[0], num_iters, eps, *args)
