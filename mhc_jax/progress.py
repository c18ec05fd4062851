"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Shows step, loss, tokens/s and time left.  Use as a context manager."""

    def __init__(self, label: str, total: int, start: int = 0, every_s: float = 5.0):
        """Plain lines come at most every `every_s` seconds."""
        self.label, self.total, self.every_s = label, total, every_s
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._began, self._start = time.monotonic(), start
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, text="")

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(f"{self.label}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """After a step whose metrics are known."""
        text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if step < self.total and now - self._last_line < self.every_s:
            return
        self._last_line = now
        left = (now - self._began) / max(step - self._start, 1) * (self.total - step)
        print(f"{self.label}: step {step}/{self.total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)
