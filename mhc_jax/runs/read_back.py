"""Open a checkpoint again before it gets its name, because some folders take files and do not give them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

from mhc_jax.files.json_files import read_json


def shapes(tree: Any) -> dict[str, list[int]]:
    """Return the shape of each array of a tree by its path, such as `params.embedding`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): [*a.shape] for path, a in leaves}


def read_back(folder: Path, parts: Mapping[str, Any], arrays: Mapping[str, list[int]]) -> None:
    """Check what can be read of a checkpoint that has just been written.

    The values of the arrays are not read, because that would take as much memory as the train state.

    Args:
      folder: the checkpoint.
      parts: the JSON values that were given for its items, by the name of the item.
      arrays: `shapes` of its train state.

    Raises:
      ValueError: JSON values are not those that were given, or arrays are missing or have other shapes.
    """
    for name, part in parts.items():
        if read_json(folder / name / "metadata") != json.loads(json.dumps(part)):
            raise ValueError(f"{name} reads otherwise than it was written")
    base = {"driver": "file", "path": f"{folder / 'state'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    described = sorted(key.decode() for key in store.list().result() if key.endswith(b"/.zarray"))
    found = {key.removesuffix("/.zarray"): json.loads(store.read(key).result().value)["shape"] for key in described}
    if found != arrays:
        raise ValueError("the names and shapes of the arrays read otherwise than they were written")
