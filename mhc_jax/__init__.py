"""A decoder with exchangeable connections: residual, Hyper-Connections, Manifold-Constrained Hyper-Connections and others.

    from mhc_jax import connect, Wiring   # connections around the blocks of your own model

`connect` is for Flax Linen and NNX, and `Wiring` for bare JAX and Equinox (docs/your_model.md).  Everything else is imported from
its module, such as `mhc_jax.model` or `mhc_jax.loop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_jax.wrappers.modules import connect
    from mhc_jax.wrappers.wiring import Wiring

__version__ = "0.1.0"
__all__ = ["Wiring", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    """Import `connect` and `Wiring` at their first use, so that an import of a module of the package costs no more than that."""
    if name == "connect":
        from mhc_jax.wrappers.modules import connect

        return connect
    if name == "Wiring":
        from mhc_jax.wrappers.wiring import Wiring

        return Wiring
    raise AttributeError(f"module 'mhc_jax' has no attribute {name!r}")
