"""Operations on residual streams: `sinkhorn`, `coefficients`, `read`, `write`, `write_read`.

Streams are flat, `[*tokens, n*C]`, stream-major: stream i is columns i C to (i + 1) C.  Coefficients are float32 with the
small axes first and the tokens last.  The only dependencies of the package are jax and, for annotations, jaxtyping.

Where to read what:

    ops/sinkhorn/reference.py      order of the normalisations, and where eps goes in the paper and in DeepSeek-V4
    ops/sinkhorn/steps.py          scaling-vector form and the derivation of the gradient
    ops/coefficients/reference.py  H_pre, H_post and H_res from the streams
    ops/read/, ops/write/          the formulas of read and write, in `reference.py`
    ops/write_read/, backends.py   the boundary in one pass over the streams, and the formula of its gradient
    api.py                         the public operations
"""

from mhc_kernels.api import coefficients, gates, projection, read, sinkhorn, write, write_read
from mhc_kernels.backend_choice import settings
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
