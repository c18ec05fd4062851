"""A cache for results of long computations.  Each result is a JSON file, and is computed again when its inputs change."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mhc_kernels

from mhc_jax.files.json_files import replacing


def cached(key: Mapping[str, Any], folder: Path, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Read a result from the cache, or compute the result and write it into the cache.

    The file's name is a hash of the key, of the versions of jax, jaxlib, flax, optax and libtpu, and of the project's source files.

    Args:
      key: JSON values on which the result depends.
      folder: folder of the cached files.
      work: a function that computes the result.

    Returns:
      The result, and whether it was in the cache.
    """
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    packages["libtpu"] = importlib.metadata.version("libtpu") if importlib.util.find_spec("libtpu") else "none"
    whole = json.dumps({**key, "packages": packages, "sources": sources()}, sort_keys=True)
    path = folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):  # A damaged file is computed again.
        return json.loads(path.read_text()), True
    result = work()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result))
    return result, False


def sources() -> str:
    """Return a hash of the source files of the packages mhc_jax and mhc_kernels."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(mhc_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
