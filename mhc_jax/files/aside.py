"""Folders in which files are written aside until they are whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".tmp"
EXTRA = len(".." + ".") + 6 + 8 + len(SUFFIX)
"""Number of bytes by which the name of a folder that is written aside is longer than the name that its content will have."""


@contextlib.contextmanager
def aside(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder beside `parent / name`, in which its content is written before it is moved there in one step.

    The folder is removed at the end, unless it has been moved.  A kill leaves it, and the next call with the same name on the same
    host removes it.  A process holds a lock of the operating system (flock) on its folder, so that those of processes that still
    run stay.  Other hosts may not see this lock, and leave the folder alone.

    Raises:
      OSError: `parent` cannot be written.
    """
    prefix = f".{name}.{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}."
    pattern = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    for path in [path for path in parent.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_NB):
            shutil.rmtree(path, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(SUFFIX, prefix, parent))
        with contextlib.ExitStack() as lock:
            # An error means that the file system has no locks, or that another call has just removed the folder.
            with contextlib.suppress(OSError):
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
