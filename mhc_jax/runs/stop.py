"""Catch the signals that ask a run to stop, and end a process that a failed save keeps from ending."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


class StopRequest:
    """A context manager that catches the first SIGINT or SIGTERM and keeps its number in `signal`, which is None until then.

    A second signal acts as it would without this class.  `say` gets a sentence about both at the first signal.
    """

    def __init__(self, say: Callable[[str], object] = lambda sentence: None) -> None:
        self.signal: int | None = None
        self._say = say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: Any) -> None:
        self.signal = number
        for each, previous in self._previous.items():
            signal.signal(each, previous)
        with contextlib.suppress(RuntimeError):  # the signal came while another line was being printed
            self._say("stopping as soon as all is saved; a second Ctrl-C ends at once, without saving")

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def signal_name(number: int) -> str:
    """Return the name of a signal for a sentence.

    >>> signal_name(2), signal_name(15)
    ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_if_a_save_hangs(status: int, error: BaseException | None = None) -> None:
    """End this process with exit status `status` if a save that failed has left threads of Orbax; else only return.

    These threads wait ten minutes for a signal that never comes, and Python's usual exit would wait for them.  The traceback of
    `error` is printed before the process ends.
    """
    waiting = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]
    if any(not thread.daemon for thread in waiting):
        with contextlib.suppress(OSError):  # nobody reads the output
            if error is not None:
                traceback.print_exception(error)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
