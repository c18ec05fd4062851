"""Operations on residual streams: `sinkhorn`, `coefficients`, `read`, `write`, `write_read`.

Streams are flat, `[*tokens, n*C]`, stream-major: stream i is columns i C to (i + 1) C.  Coefficients are float32 with the
small axes first and the tokens last.  Depends on jax (and jaxtyping, for annotations) alone.
"""

from mhc_kernels.coefficients.reference import PARTS, Coefficients, coefficients, columns, projection
from mhc_kernels.read.reference import read, split
from mhc_kernels.sinkhorn.reference import sinkhorn
from mhc_kernels.write.reference import write
from mhc_kernels.write_read.reference import write_read

__all__ = [
    "PARTS",
    "Coefficients",
    "coefficients",
    "columns",
    "projection",
    "read",
    "sinkhorn",
    "split",
    "write",
    "write_read",
]
