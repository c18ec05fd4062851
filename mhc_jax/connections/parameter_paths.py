"""Paths of parameters, by which optimizer masks and shardings know them."""

from __future__ import annotations

from typing import Any

CONNECTION = r"(^|/)(\w+_connection|ends)/"
"""Parameters that belong to a connection, by path."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """`layers/attention/W_q` from a jax key path."""
    return "/".join(str(getattr(k, "key", k)) for k in key_path)
