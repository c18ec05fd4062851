"""Identity Hyper-Connections (iHC, Hunyuan HY-V4): H_res = I, with mHC's read and write.

The kind shows what H_res is worth: with the same `init` it differs from mHC in H_res alone.  The defaults of `init` differ: `paper`
for mHC, HY-V4's `residual` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mhc_jax.connections.dynamic import DynamicConfig, DynamicConnection


@dataclass(frozen=True)
class IdentityConfig(DynamicConfig):
    """Settings of iHC.  HY-V4's own are `identity:eps_convention=hy_v4:exit=head`."""

    kind: ClassVar[str] = "identity"
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post")
    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4", "hy_v4")

    init: str = "residual"
    """HY-V4's start: H_pre reads each stream with 1/n (b_pre = -ln(n - 1)) and H_post writes each with 1 (b_post = 0)."""


class Identity(DynamicConnection):
    r"""iHC: $x' = x + (H^{post})^\top F(H^{pre} x)$; phi is [nC, 2n]."""

    config_class = IdentityConfig
