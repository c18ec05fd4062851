"""Identity Hyper-Connections (iHC, Hunyuan HY-V4): H_res = I, with mHC's read and write.

A comparison with mHC shows what H_res is worth, because with the same `init` the two differ in H_res alone.  The default of `init`
is `residual` here, as in HY-V4, and `paper` in mHC.
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
    """Preset of the static logits (`bias_init`).  With `residual`, as in HY-V4, H_pre starts at 1/n (b_pre = -ln(n - 1)) and H_post
    at 1 (b_post = 0) for each stream."""


class Identity(DynamicConnection):
    r"""The connection iHC: $x' = x + (H^{post})^\top F(H^{pre} x)$.  The projection phi is [nC, 2n]."""

    config_class = IdentityConfig
