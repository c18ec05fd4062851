"""Paths of parameters, by which other modules tell parameters apart.

Several modules must agree on how a path is spelled, and on which parameters belong to connections or to stacked blocks.  This file
holds these rules.  A rule that only one module needs lies in that module, such as `optim.NO_DECAY` and the logical axes
`parallel.sharding.PARAMETERS`.
"""

from __future__ import annotations

from typing import Any

CONNECTION = r"(^|/)(\w+_connection|ends)/"
"""Regular expression that matches the paths of the parameters of connections."""
STACKED = r"(^|/)(dense_)?layers/"
"""Regular expression that matches the paths of parameters that are stacked over blocks, with shapes [blocks, ...]."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return the path of a parameter as text, for example `layers/attention/W_q`, from its JAX key path."""
    return "/".join(str(getattr(k, "key", k)) for k in key_path)
