"""Paths of parameters, by which optimizer masks and shardings recognise them."""

from __future__ import annotations

from typing import Any

CONNECTION = r"(^|/)(\w+_connection|ends)/"
"""Regular expression that matches the paths of the parameters of connections."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """The path of a parameter as text, such as `layers/attention/W_q`, from its JAX key path."""
    return "/".join(str(getattr(key, "key", key)) for key in key_path)
