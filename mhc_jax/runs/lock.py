"""The lock of a run folder.  One command at a time holds it, the command that trains the run.

An evaluation holds the lock of its own folder in the same way.

The lock is a file lock of the operating system (flock) on the file `lock` of the folder.  It ends with the process that holds
it, also if that process is killed.  The file stays, and names the process that held the lock last.  `docs/run_folders.md` says what
holds on network file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mhc_jax.errors import InputError
from mhc_jax.runs.trackers import warn

LOCK = "lock"
"""Name of the lock's file in its folder."""
PATIENCE_S = 0.2
"""Seconds to try for a lock.  `holder` takes it for a moment to see whether it is free."""


class Busy(InputError):  # noqa: N818  (a state, not a mistake)
    """Raised when another process holds the lock of a folder.  `holder` names that process."""

    def __init__(self, folder: Path, holder: str):
        self.holder = holder
        super().__init__(
            f"{folder} is in use: {holder} writes into it; wait until that process has ended, or choose another folder."
        )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which exists, while the body of the `with` statement runs.

    If the file system has no locks, a warning says so, and the body runs without one.

    Raises:
      Busy: another process holds the lock.
      InputError: the folder cannot be written.
    """
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"Cannot write {folder / LOCK}: {error.strerror}; choose a folder you may write to."
        ) from error
    with file:
        deadline = time.monotonic() + PATIENCE_S
        while not _locked(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy(folder, _named(file))
            time.sleep(PATIENCE_S / 20)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # The other processes of the run read this line, maybe from another host (`lock_text`).
        yield


def holder(folder: Path) -> str:
    """Return the process that holds the lock of a folder, such as `process 12 on host`; empty if there is none."""
    try:
        with (folder / LOCK).open("r") as file:
            return "" if _locked(file, fcntl.LOCK_SH) else _named(file)
    except OSError:  # There is no lock yet.
        return ""


def lock_text(folder: Path) -> str:
    """Return the line of a lock's file, by which the processes of a run see whether they have the same folder."""
    try:
        return (folder / LOCK).read_text()
    except OSError:
        return ""


def require_free(folder: Path) -> None:
    """Raise `Busy` if another process holds the lock of a folder."""
    if name := holder(folder):
        raise Busy(folder, name)


def _locked(file: IO[str], kind: int) -> bool:
    """Lock a file and return true, or return false if another process has locked it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warn(
            f"{file.name} cannot be locked ({error.strerror}); let no second command write into its folder at the same time."
        )
    return True


def _named(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"
