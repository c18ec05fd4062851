"""The table of all kinds of connection, and functions that read and write a connection and its settings as one line of text.

A new kind of connection needs one file in this folder and one line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhc_jax.connections.attnres_block import AttnResBlock
from mhc_jax.connections.base import Connection, ConnectionConfig
from mhc_jax.connections.circulant import Circulant
from mhc_jax.connections.delta_attnres import DeltaAttnRes
from mhc_jax.connections.diagonal import Diagonal
from mhc_jax.connections.gated import Gated
from mhc_jax.connections.go_mhc import GoMHC
from mhc_jax.connections.hc import HyperConnection
from mhc_jax.connections.identity import Identity
from mhc_jax.connections.identity_mix import IdentityMix
from mhc_jax.connections.kromhc import KromHC
from mhc_jax.connections.lanes import Lanes
from mhc_jax.connections.mhc import ManifoldHyperConnection
from mhc_jax.connections.mhc_lite import MHCLite
from mhc_jax.connections.mudd import Mudd
from mhc_jax.connections.residual import Residual
from mhc_jax.connections.scalar_gated import ScalarGated
from mhc_jax.connections.single_pass import SinglePass
from mhc_jax.errors import one_of
from mhc_jax.settings_text import read_settings, write_settings

KINDS: dict[str, type[Connection]] = {
    "residual": Residual,
    "hc": HyperConnection,
    "mhc": ManifoldHyperConnection,
    "scalar_gated": ScalarGated,
    "lanes": Lanes,
    "identity": Identity,
    "diagonal": Diagonal,
    "identity_mix": IdentityMix,
    "mhc_lite": MHCLite,
    "kromhc": KromHC,
    "circulant": Circulant,
    "go_mhc": GoMHC,
    "single_pass": SinglePass,
    "gated": Gated,
    "attnres_block": AttnResBlock,
    "delta_attnres": DeltaAttnRes,
    "mudd": Mudd,
}


def config_class(kind: str) -> type[ConnectionConfig]:
    """Return the config dataclass of a kind of connection.

    Raises:
      InputError: there is no such kind.  The message names the kind with the nearest spelling.

    Examples:
      >>> config_class("mhc").__name__
      'ManifoldHyperConnectionConfig'
    """
    one_of("connection.kind", kind, KINDS)
    return KINDS[kind].config_class


def connection_module(config: ConnectionConfig) -> type[Connection]:
    """Return the Flax module class of the kind of connection that a config belongs to.

    Examples:
      >>> connection_module(parse("mhc")).__name__
      'ManifoldHyperConnection'
    """
    return KINDS[config.kind]


def default_config(kind: str, **settings: Any) -> ConnectionConfig:
    """Return the config of a kind of connection, with `settings` and otherwise with the defaults of the kind.

    Raises:
      InputError: there is no such kind, or the kind refuses the value of a setting.

    Examples:
      >>> default_config("mhc", t_max=5) == parse("mhc:t_max=5")
      True
    """
    return config_class(kind)(**settings)


def parse(spec: str) -> ConnectionConfig:
    """Return the config of the connection that a text describes: `kind`, or a kind with settings, `kind:key=value:key=value`.

    Config files and command lines name connections by such texts.  The entries of a tuple are joined with +, as in
    `mhc:disable=pre+post`.

    Raises:
      InputError: the kind or a setting is unknown, or a value is not allowed.

    Examples:
      >>> config = parse("mhc:init=home:num_streams=2")
      >>> config.init, config.num_streams, config.t_max
      ('home', 2, 20)
    """
    kind = spec.partition(":")[0]
    cls = config_class(kind)
    return cls(**read_settings("connection", spec, vars(cls())))


def spec(config: ConnectionConfig) -> str:
    """Return the text from which `parse` makes `config`: its kind, then each setting that differs from its default.

    Settings stand in the order of the config's fields.  The setting `init`, which not every kind has, is named even at its default,
    so that the label of a run tells its initial values.

    Examples:
      >>> spec(parse("mhc:t_max=5"))
      'mhc:init=paper:t_max=5'
    """
    return spec_of_mapping({"kind": config.kind, **vars(config)})


def spec_of_mapping(mapping: Mapping[str, Any]) -> str:
    """Return the text of a connection, as `spec` does, from a plain mapping such as the one in the config.json of a run.

    Lists stand for tuples, and a missing setting has its default.  Settings are not checked, so that runs of older versions of the
    code have labels too.  Settings without a known default, such as those of a kind that is not in `KINDS`, come last.

    Examples:
      >>> spec_of_mapping({"kind": "mhc", "init": "home", "disable": ["pre", "post"]})
      'mhc:disable=pre+post:init=home'
    """
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items() if key != "kind"}
    kind = mapping["kind"]
    defaults = vars(KINDS[kind].config_class()) if kind in KINDS else {}
    return write_settings(kind, {**defaults, **given}, defaults, always=["init"])


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
