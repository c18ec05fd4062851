"""The folder on disk that keeps tokenized text and prepared data sets."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mhc_jax.errors import InputError, user_path


def cache_folder() -> Path:
    """Create the cache folder and return its path: $MHC_JAX_CACHE, or ~/.cache/mhc_jax without that variable.

    Raises:
      InputError: the folder cannot be created or written to.
    """
    try:
        folder = user_path(os.environ.get("MHC_JAX_CACHE") or "~/.cache/mhc_jax")
    except InputError as error:
        raise InputError(f"The cache folder: {error} $MHC_JAX_CACHE names this folder.") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"The cache folder {folder} cannot be written ({error.strerror}); set $MHC_JAX_CACHE to a folder that can."
        ) from error
    return folder.resolve()
