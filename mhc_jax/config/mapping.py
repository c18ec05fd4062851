"""Convert settings to plain nested mappings and back.  Config files and the config.json of a run hold such mappings.

`to_mapping` gives a config file the default settings, which the file and the command line change.  `from_mapping` makes an
`ExperimentConfig` of the changed mapping, and refuses unknown keys.  Only `experiments/` and config files use
`ml_collections.ConfigDict`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.connections.base import ConnectionConfig
from mhc_jax.errors import LARGEST, InputError, one_of, require, shown


def to_mapping(config: Any) -> dict[str, Any]:
    """Return all settings of `config`, defaults included, as a nested dict of plain values.  Tuples become lists, as in JSON."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": value.kind, **out} if isinstance(value, ConnectionConfig) else out
    return list(value) if isinstance(value, tuple) else value


def from_mapping(mapping: Mapping[str, Any]) -> ExperimentConfig:
    """Build an `ExperimentConfig` from the nested mapping of a config file or a run folder's config.json.

    Raises:
      InputError: a key is unknown (the message names the nearest known one), or a value has the wrong type or is not allowed.
    """
    return _build(ExperimentConfig, mapping, "config")


_type_hints = functools.cache(typing.get_type_hints)


def _build(cls: type, mapping: Mapping[str, Any], path: str) -> Any:
    if cls is ConnectionConfig:
        mapping = dict(mapping)
        kind = mapping.pop("kind", "mhc")
        require(isinstance(kind, str), f"{path}.kind is {shown(kind)}; it must be a text such as 'mhc'.")
        cls = connections.config_class(kind)
    types = _type_hints(cls)
    fields = {f.name: types[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in mapping.items():
        one_of(f"A key of {path}", key, fields)
        values[key] = _convert(fields[key], value, f"{path}.{key}")
    return cls(**values)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{path} is {shown(value)}; it must be a mapping of settings.")
        return _build(typing.cast(type, kind), value, path)
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        texts = isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items)
        require(texts, f"{path} is {shown(value)}; it must be a list of texts.")
        return tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= LARGEST, f"{path} is {shown(value)}; a number must be at most 3.4e38 in size (float32).")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{path} is {shown(value)}, a {type(value).__name__}; it must be a {kind.__name__}.")
    return float(value) if kind is float else value  # A float64 of NumPy is a float with another spelling.
