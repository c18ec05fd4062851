"""Catch the signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
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
