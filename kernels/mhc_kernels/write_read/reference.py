"""Boundary between two sub-layers, composed from write, coefficients and read.  The semantics of the fused op."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from mhc_kernels.coefficients.reference import Coefficients, coefficients
from mhc_kernels.read.reference import read
from mhc_kernels.write.reference import write


def write_read(
    x: Float[Array, "*tokens nC"],
    c: Coefficients,
    y: Float[Array, "*tokens C"],
    phi: Float[Array, "nC k"],
    alpha: Float[Array, " parts"],
    bias: Float[Array, " k"],
    *,
    num_streams: int,
    **options: Any,
) -> tuple[Float[Array, "*tokens nC"], Coefficients, Float[Array, "*tokens C"]]:
    """Write y with the coefficients of the sub-layer that made it, then coefficients and read of the next sub-layer.

    Args:
      x: streams the previous sub-layer read from.
      c: its coefficients.
      y: its branch output.
      phi, alpha, bias: parameters of the next sub-layer.
      num_streams: n.
      **options: those of `coefficients`.

    Returns:
      (new streams, coefficients of the next sub-layer, what its branch reads).

    Traffic per token: (2 n + 2) C in one pass is the floor; composed as here XLA moves at least (4 n + 3) C.
    """
    x = write(x, y, c.post, c.res, num_streams)
    c = coefficients(x, phi, alpha, bias, num_streams=num_streams, **options)
    return x, c, read(x, c.pre, num_streams)
