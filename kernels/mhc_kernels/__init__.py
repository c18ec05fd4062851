"""Operations on residual streams: `sinkhorn`, `coefficients`, `read`, `write`, `write_read`.

Streams are flat, `[*tokens, n*C]`, stream-major: stream i is columns i C to (i + 1) C.  Coefficients are float32 with the
small axes first and the tokens last.  The package depends on jax (and jaxtyping, for annotations) alone.

Each operation has a folder in `ops/`.  Its `reference.py` is the formula.
"""

from mhc_kernels.api import coefficients, gates, projection, read, sinkhorn, write, write_read
from mhc_kernels.choice import settings
from mhc_kernels.layout import PARTS, Coefficients, columns, split
from mhc_kernels.ops.rms_norm import inverse_rms, normalized

__all__ = [
    "PARTS",
    "Coefficients",
    "coefficients",
    "columns",
    "gates",
    "inverse_rms",
    "normalized",
    "projection",
    "read",
    "settings",
    "sinkhorn",
    "split",
    "write",
    "write_read",
]
