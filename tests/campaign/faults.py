"""What befalls a command from within: it is killed at its k-th write operation or shortly after it, or the operation fails.

Write operations are those of Python that make, open for writing, rename or remove a file or folder.  An audit hook of the
interpreter (`sys.addaudithook`) sees each of them before it happens, also those of libraries.  The writes of TensorStore's threads
are not among them: random moments and real small disks meet these.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
"""Audit events of operations that change a folder, besides `open`."""


@dataclass(frozen=True)
class Fault:
    """A fault of one process.  An `action` happens at write operation `at`, counted from 1, below the folder `below`."""

    below: str
    action: str = "count"
    """`kill`; `alarm` (dies `delay_s` later); `error` (the operation fails with `errno`); `count` (operations are listed alone)."""
    at: int = 0
    delay_s: float = 0.0
    errno: int = 0
    lasting: bool = False
    """Whether all later operations fail as well."""
    worker: int = -1
    """Number of the worker of a sweep that the fault befalls, counted from 0 in the order of starts; -1: the command itself."""
    trace: str = ""
    """File that gets a line for each operation; empty: none."""
    clock: int = 0
    """Seed of the jumps of the clock; 0: the clock does not jump."""

    def for_worker(self, number: int) -> Fault | None:
        """Return the fault of a worker, or None."""
        if self.clock or self.worker == number:
            return dataclasses.replace(self, worker=-1)
        return None


_armed = False


def disarm() -> None:
    """Take away the fault of this process, after a fork of a process that had one."""
    global _armed
    _armed = False


def arm(fault: Fault | None) -> None:
    """Let a fault befall this process."""
    global _armed
    if fault is None:
        return
    if fault.clock:
        _let_clock_jump(random.Random(fault.clock))
    if fault.worker >= 0:
        return
    _armed = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # The alarm ends the process at once, as SIGKILL does.
    count, owner = itertools.count(1), os.getpid()
    trace = os.open(fault.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.trace else -1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _armed or (event != "open" and event not in CHANGES) or os.getpid() != owner:
            return
        if (name := _changed(event, arguments, fault.below)) is None:
            return
        number = next(count)
        if trace >= 0:
            os.write(trace, f"{event} {name}\n".encode(errors="replace"))
        if number == fault.at and fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == fault.at and fault.action == "alarm":
            signal.setitimer(signal.ITIMER_REAL, fault.delay_s)
        if fault.action == "error" and (number == fault.at or (fault.lasting and number > fault.at)):
            raise OSError(fault.errno, os.strerror(fault.errno), name)

    sys.addaudithook(hook)


def _changed(event: str, arguments: tuple[Any, ...], below: str) -> str | None:
    """Return the path that an audit event is about to change, or None if it changes nothing below the folder."""
    path = arguments[0]
    if isinstance(path, int):
        return None
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return None
        relative = False
    else:  # `shutil.rmtree` removes by the descriptor of a folder, which is the last argument.
        relative = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
    try:
        name = os.fsdecode(path)
    except TypeError:
        return None
    return name if relative or os.path.abspath(name).startswith(below) else None


def _let_clock_jump(rng: random.Random) -> None:
    """Let `time.time` jump by up to two days, back or forth, at about every hundredth call."""
    true, offset = time.time, 0.0

    def jumping() -> float:
        nonlocal offset
        if rng.random() < 0.01:
            offset = rng.choice([-1, 1]) * 10 ** rng.uniform(0, 5.2)
        return true() + offset

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
