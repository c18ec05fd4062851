"""Operations on residual streams: `sinkhorn`, `coefficients`, `read`, `write`, `write_read`.

The n streams of C channels are one array `[*tokens, n*C]`, in which stream i is columns i C to (i + 1) C.  Coefficients are
float32 arrays `[n, *tokens]` or `[n, n, *tokens]`.  `*tokens` stands for any number of token axes, such as batch and time.

The only dependencies of the package are jax and, for annotations, jaxtyping (NumPy comes with jax).  Modules of Pallas kernels are
imported when a GPU or TPU first runs them; `triton_sinkhorn` alone needs jax-triton, and is used only where that is installed.

Where each formula is explained:

    ops/sinkhorn/reference.py      the order of the normalisations of Sinkhorn, and the place of eps in mHC and in DeepSeek-V4
    ops/sinkhorn/steps.py          Sinkhorn as an iteration of two scaling vectors, and the derivation of its gradient
    ops/coefficients/reference.py  how H_pre, H_post and H_res are made from the streams
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
