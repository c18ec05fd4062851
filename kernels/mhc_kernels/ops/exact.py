"""The operations in float64 as the papers write them, gradients by autodiff, on the host CPU.

What a backend is held against on its own device; nothing here is shared with `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mhc_kernels.ops.arg_specs import ArgSpec, program


def textbook_sinkhorn(logits: Any, t_max: int = 20) -> Any:
    """mHC Eq. 9 as it is written, on [..., n, n] of any float dtype."""
    M = jnp.exp(logits - logits.max((-1, -2), keepdims=True))

    def step(M, _):
        M = M / M.sum(-2, keepdims=True)
        return M / M.sum(-1, keepdims=True), None

    return lax.scan(step, M, None, length=t_max)[0]


def _function(op: str, spec: ArgSpec) -> Callable[..., tuple[Any, ...]]:
    n = spec.num_streams

    def sinkhorn(logits):
        return (jnp.moveaxis(textbook_sinkhorn(jnp.moveaxis(logits, -1, 0)), 0, -1),)

    def coefficients(x, phi, alpha, bias):
        z = (x @ phi) / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
        pre, post, res = jnp.split(z.T, [n, 2 * n])
        b_pre, b_post, b_res = jnp.split(bias[:, None], [n, 2 * n])
        logits = (alpha[2] * res + b_res).reshape(n, n, -1)
        return jax.nn.sigmoid(alpha[0] * pre + b_pre), 2 * jax.nn.sigmoid(alpha[1] * post + b_post), *sinkhorn(logits)

    def read(x, pre):
        return (jnp.einsum("tic,it->tc", x.reshape(x.shape[0], n, -1), pre),)

    def write(x, y, post, res):
        mixed = jnp.einsum("ijt,tjc->tic", res, x.reshape(x.shape[0], n, -1))
        return ((mixed + jnp.einsum("it,tc->tic", post, y)).reshape(x.shape),)

    def write_read(x, y, post, res, phi, alpha, bias):
        (new,) = write(x, y, post, res)
        # What the next sub-layer sees are streams in their own dtype.
        new = new + lax.stop_gradient(new.astype(spec.dtype).astype(new.dtype) - new)
        c = coefficients(new, phi, alpha, bias)
        return new, *c, *read(new, c[0])

    return {"sinkhorn": sinkhorn, "coefficients": coefficients, "read": read, "write": write, "write_read": write_read}[
        op
    ]


def exact(op: str, spec: ArgSpec, given: Sequence[Any], cotangents: Sequence[Any]) -> list[np.ndarray]:
    """Outputs, then gradients of the arguments, float64 (`arg_specs.ARGUMENTS`, `arg_specs.OUTPUTS`).

    Raises:
      RuntimeError: JAX_PLATFORMS leaves the CPU out.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        given, cotangents = (
            tuple(jnp.asarray(np.asarray(a, np.float64)) for a in arrays) for arrays in (given, cotangents)
        )
        return [np.asarray(a) for a in jax.jit(program(_function(op, spec), True))(given, cotangents)]
