"""Registry of connection kinds.  A new kind is one file here and one line in `KINDS`."""

from __future__ import annotations

from typing import Any

from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.connections.hc import HyperConnection
from mhc_jax.connections.mhc import ManifoldHyperConnection
from mhc_jax.connections.residual import Residual
from mhc_jax.errors import one_of

KINDS: dict[str, type[Connection]] = {
    "residual": Residual,
    "hc": HyperConnection,
    "mhc": ManifoldHyperConnection,
}


def config_class(kind: str) -> type[ConnectionConfig]:
    """Config dataclass of a kind.

    Raises:
      InputError: no such kind; the message names the nearest.
    """
    one_of("connection.kind", kind, KINDS)
    return KINDS[kind].config_class


def default_config(kind: str, **settings: Any) -> ConnectionConfig:
    """Config of a kind with its defaults, but for `settings`."""
    return config_class(kind)(**settings)


def connection_module(config: ConnectionConfig) -> type[Connection]:
    """Module class of a config's kind."""
    return KINDS[config.kind]


__all__ = ["KINDS", "Connection", "ConnectionConfig", "config_class", "connection_module", "default_config"]
