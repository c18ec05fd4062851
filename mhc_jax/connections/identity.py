"""Identity Hyper-Connections (iHC, Hunyuan HY-V4): mHC with the identity as its mixing matrix H_res.

With the same setting `init`, iHC and mHC differ in H_res alone, so that their comparison shows what H_res contributes.  The default
of `init` is `residual` for iHC, as in HY-V4, and `paper` for mHC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mhc_jax.connections.mhc_family import DynamicConfig, DynamicConnection


@dataclass(frozen=True)
class IdentityConfig(DynamicConfig):
    """Settings of iHC.  The model HY-V4 uses `identity:eps_convention=hy_v4:exit=head`."""

    kind: ClassVar[str] = "identity"
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post")
    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4", "hy_v4")

    init: str = "residual"
    """Preset of the initial static logits (`bias_init`).  With `residual`, as in HY-V4, H_pre starts at 1/n for each stream
    (b_pre = -ln(n - 1)), and H_post starts at 1 (b_post = 0)."""


class Identity(DynamicConnection):
    r"""The connection iHC: $x' = x + (H^{post})^\top F(H^{pre} x)$.  The projection phi has the shape [nC, 2n]."""

    config_class = IdentityConfig
