"""The boundary between two sub-layers: the write of the first, then the coefficients and the read of the second."""

from __future__ import annotations

from jax import Array, lax

from mhc_kernels.ops.coefficients.reference import coefficients
from mhc_kernels.ops.read.reference import read
from mhc_kernels.ops.write.reference import write

Parts = tuple[Array | None, Array, Array]
"""H_pre, H_post and H_res of a sub-layer; the boundary does not use H_pre of the first sub-layer."""


def write_read(
    x: Array, c: Parts, y: Array, phi: Array, alpha: Array, bias: Array, *, num_streams: int, stream_dtype: str
) -> tuple[Array, Parts, Array]:
    """Map streams x [N, nC], c and y [N, C] of a sub-layer -> x' [N, nC], c and h [N, C] of the next; c are the coefficients."""
    _, post, res = c
    new = write(x, y, post, res, num_streams)
    # The second sub-layer sees streams rounded to their own dtype.  The gradient passes the rounding unchanged.
    new = new + lax.stop_gradient(new.astype(stream_dtype).astype(new.dtype) - new)
    pre, post, res = coefficients(new, phi, alpha, bias, num_streams=num_streams)
    return new, (pre, post, res), read(new, pre, num_streams)
