"""The folder on disk that keeps prepared data: token arrays and the prepared corpus."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mhc_jax.errors import InputError


def cache_folder(given: str = "") -> Path:
    """Return the cache folder, created: `given`, else $MHC_JAX_CACHE, else ~/.cache/mhc_jax.

    Raises:
      InputError: the folder cannot be created or written to.
    """
    folder = Path(given or os.environ.get("MHC_JAX_CACHE", "") or "~/.cache/mhc_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"The cache folder {folder} cannot be written ({error.strerror}); "
            f"set data.cache_dir or $MHC_JAX_CACHE to a folder that can."
        ) from error
    return folder.resolve()
