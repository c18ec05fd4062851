"""SwiGLU feed-forward (Shazeer, arXiv 2002.05202, Eq. 6), and the linear projection that all branches use."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import constrain, current


def project(
    module: nn.Module, name: str, x: Float[Array, "B T _"], outputs: int, scale: float = 1.0
) -> Float[Array, "B T {outputs}"]:
    """Return the product x W in the dtype of x.  W [in, outputs] becomes the parameter `name` of the module.

    The initial entries of W are random numbers N(0, scale^2 / in).
    """
    init = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
    W = module.param(name, init, (x.shape[-1], outputs)).astype(x.dtype)
    # If the token axes are not merged, XLA:CPU transposes a copy for the gradient of W.  On a mesh both axes may be sharded.
    return x @ W if current() is not None else (x.reshape(-1, x.shape[-1]) @ W).reshape(*x.shape[:-1], outputs)


@jax.custom_vjp
def gated(gate: Float[Array, "*tokens F"], up: Float[Array, "*tokens F"]) -> Float[Array, "*tokens F"]:
    r"""Return $\mathrm{silu}(\mathit{gate}) \odot \mathit{up}$.  The backward pass keeps the two arguments alone."""
    return nn.silu(gate) * up


def _gated_bwd(saved, g):
    r"""Return the gradients $g\, u\, s\, (1 + a\, (1 - s))$ of the gate a and $g\, a\, s$ of u, with $s = \sigma(a)$."""
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    return g * up * (s * (1 + gate * (1 - s))), g * (gate * s)


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_bwd)


def swiglu(
    module: nn.Module, prefix: str, x: Float[Array, "B T C"], hidden: int, output_scale: float
) -> Float[Array, "B T C"]:
    r"""Apply SwiGLU to x in the dtype of x, with parameters of the module (arXiv 2002.05202, Eq. 6).

    $(\mathrm{silu}(x W_{gate}) \odot x W_{up})\, W_{down}$

    Args:
      module: the module that gets the parameters.
      prefix: parameters are named `{prefix}_gate`, `{prefix}_up` and `{prefix}_down`.
      x: normed input.
      hidden: number of hidden channels.
      output_scale: factor by which the initial W_down is multiplied.
    """
    gate = project(module, f"{prefix}_gate", x, hidden)
    up = project(module, f"{prefix}_up", x, hidden)
    hidden_channels = constrain(gated(gate, up), "batch", "sequence", "hidden")
    return project(module, f"{prefix}_down", hidden_channels, x.shape[-1], output_scale)


class SwiGLU(nn.Module):
    """The dense feed-forward branch: RMSNorm, then `swiglu`."""

    hidden: int
    """Number of hidden channels."""
    norm_eps: float
    output_scale: float
    """Factor by which the initial output matrix W_down is multiplied."""
    dtype: Any
    """Dtype in which matrices are multiplied."""

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Return the output of the branch in `dtype`, and an empty dict, since this branch has no auxiliary values."""
        x = RMSNorm(self.norm_eps, name="norm")(h).astype(self.dtype)
        return swiglu(self, "W", x, self.hidden, self.output_scale), {}
