"""Identity Hyper-Connections (iHC; Hunyuan HY-V4): H_res = I, mHC's read and write.

The ablation that tells what H_res is worth: with the same `init`, mHC and this differ in H_res alone.  The defaults differ: mHC
starts with `init=paper`, this with HY-V4's `init=residual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mhc_jax.connections.dynamic import DynamicConfig, DynamicConnection


@dataclass(frozen=True)
class IdentityConfig(DynamicConfig):
    """Settings of iHC.  HY-V4 itself is `eps_convention=hy_v4:exit=head`."""

    kind: ClassVar[str] = "identity"
    learnable: ClassVar[tuple[str, ...]] = ("pre", "post")
    eps_conventions: ClassVar[tuple[str, ...]] = ("paper", "v4", "hy_v4")

    init: str = "residual"
    """HY-V4's start: it reads each stream with 1/n (b_pre = -ln(n-1)) and writes each with 1 (b_post = 0)."""


class Identity(DynamicConnection):
    """x' = x + H_post^T F(H_pre x); phi is [nC, 2n]."""

    config_class = IdentityConfig
