"""Registry of connection kinds.  A new kind is one file here and one line in `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhc_jax.connections.attnres_block import AttnResBlock
from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.connections.circulant import Circulant
from mhc_jax.connections.gated import Gated
from mhc_jax.connections.hc import HyperConnection
from mhc_jax.connections.identity import Identity
from mhc_jax.connections.kromhc import KromHC
from mhc_jax.connections.mhc import ManifoldHyperConnection
from mhc_jax.connections.mhc_lite import MHCLite
from mhc_jax.connections.residual import Residual
from mhc_jax.connections.scalar_gated import ScalarGated
from mhc_jax.connections.single_pass import SinglePass
from mhc_jax.errors import one_of
from mhc_jax.spelling import read_settings, write_settings

KINDS: dict[str, type[Connection]] = {
    "residual": Residual,
    "hc": HyperConnection,
    "mhc": ManifoldHyperConnection,
    "scalar_gated": ScalarGated,
    "identity": Identity,
    "mhc_lite": MHCLite,
    "kromhc": KromHC,
    "circulant": Circulant,
    "single_pass": SinglePass,
    "gated": Gated,
    "attnres_block": AttnResBlock,
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


def parse(spec: str) -> ConnectionConfig:
    """Config from `kind` or `kind:key=value:key=value`, as config files and command lines spell it.

    >>> parse("mhc:init=home:num_streams=2").num_streams
    2

    Raises:
      InputError: an unknown kind or setting, or a value of the wrong type.
    """
    kind = spec.partition(":")[0]
    cls = config_class(kind)
    return cls(**read_settings("connection", spec, vars(cls())))


def spec(config: ConnectionConfig) -> str:
    """Canonical spelling of a config, the inverse of `parse`: its kind, then each setting that differs from the kind's default.

    Settings stand in the order of the config's fields.  `init` is always named where a kind has it, so that a label says which
    start it means.

    >>> spec(parse("mhc:t_max=5"))
    'mhc:init=paper:t_max=5'
    """
    return spec_of_mapping({"kind": config.kind, **vars(config)})


def spec_of_mapping(mapping: Mapping[str, Any]) -> str:
    """`spec` of the plain mapping that a run's config.json holds: lists for tuples, and a missing setting has its default.

    Nothing is checked, so that a record of any age has a label: settings without a known default, those of an unregistered kind
    among them, are all named, last.

    >>> spec_of_mapping({"kind": "mhc", "init": "home", "disable": ["pre", "post"]})
    'mhc:disable=pre+post:init=home'
    """
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items() if key != "kind"}
    kind = mapping["kind"]
    defaults = vars(KINDS[kind].config_class()) if kind in KINDS else {}
    return write_settings(kind, {**defaults, **given}, defaults, always=["init"])


def connection_module(config: ConnectionConfig) -> type[Connection]:
    """Module class of a config's kind."""
    return KINDS[config.kind]


__all__ = [
    "KINDS",
    "Connection",
    "ConnectionConfig",
    "config_class",
    "connection_module",
    "default_config",
    "parse",
    "spec",
    "spec_of_mapping",
]
