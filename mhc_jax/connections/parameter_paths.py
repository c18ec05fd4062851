"""Paths of parameters, by which other modules tell parameters apart.

Here is what several modules must agree on: how a path is spelled, and which parameters belong to connections or to stacked blocks.
A rule that has one user lies beside it: `optim.NO_DECAY`, and the logical axes `parallel.sharding.PARAMETERS`.
"""

from __future__ import annotations

from typing import Any

CONNECTION = r"(^|/)(\w+_connection|ends)/"
"""Matches the paths of connections' parameters."""
STACKED = r"(^|/)(dense_)?layers/"
"""Matches the paths of parameters that are stacked over blocks, [blocks, ...]."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """The path of a JAX key path, for example `layers/attention/W_q`."""
    return "/".join(str(getattr(k, "key", k)) for k in key_path)
