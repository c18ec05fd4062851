"""Paths of parameters as text, and regular expressions that tell from the path what a parameter belongs to.

Several modules use these rules.  A rule that only one module uses is in that module, such as `optim.NO_DECAY` (parameters without
weight decay) and `parallel.sharding.PARAMETERS` (logical axes of parameters).
"""

from __future__ import annotations

from typing import Any

CONNECTION = r"(^|/)(\w+_connection|ends)/"
"""Regular expression that matches the paths of the parameters of connections, entry and exit included."""
STACKED = r"(^|/)(dense_)?layers/"
"""Regular expression that matches the paths of parameters whose first axis runs over blocks (shape [blocks, ...])."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return the path of a parameter as text, for example `layers/attention/W_q`, from its JAX key path."""
    return "/".join(str(getattr(k, "key", k)) for k in key_path)
