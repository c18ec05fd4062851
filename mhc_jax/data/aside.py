"""Folders in which files are written aside until they are whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".tmp"


@contextlib.contextmanager
def aside(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder beside `parent / name`, in which its content is written before it is moved there in one step.

    The folder is removed at the end, unless it has been moved.  A kill leaves it, and the next call with the same name removes it.
    A process holds a lock of the operating system (flock) on its folder, so that those of processes that still run stay.

    Raises:
      OSError: `parent` cannot be written.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    for path in [path for path in parent.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_NB):
            shutil.rmtree(path, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(SUFFIX, f".{name}.", parent))
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(
                OSError
            ):  # The file system has no locks, or another call has just removed the folder.
                lock.enter_context(_locked(folder))
            if not folder.exists():
                continue
            folder.chmod(0o755)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold the lock of a folder.  Raise `OSError` if it cannot be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)
