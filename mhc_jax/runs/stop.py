"""Catch the signals that ask a run to stop."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """A context manager that catches the first SIGINT or SIGTERM and keeps its number in `signal`, which is None until then.

    A second signal acts as it would without this class.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: Any) -> None:
        self.signal = number
        for each, previous in self._previous.items():
            signal.signal(each, previous)

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
