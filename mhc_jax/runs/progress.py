"""Show the progress of work on standard error: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import progress as rich
from rich.console import Console

TEXT = "{task.fields[text]}"


class _Bars:
    """A context manager that shows progress bars, one a line.  Each line has a name, a bar, a count and the given `columns`."""

    def __init__(self, *columns: str | rich.ProgressColumn, shown: bool = True):
        console = Console(file=sys.stderr, soft_wrap=True)
        self._shown, self._live = shown, shown and console.is_terminal
        first = "[bold]{task.description}", rich.BarColumn(), rich.MofNCompleteColumn()
        self._bars = rich.Progress(*first, *columns, console=console, disable=not self._live)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def _print(self, line: str) -> None:
        """Print a line, which stays above the bars if there are any."""
        if self._live:
            self._bars.console.print(line, highlight=False, markup=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


class Progress(_Bars):
    """Shows how many of `total` pieces of work, such as steps, are done, and how long the remaining pieces will take."""

    def __init__(
        self, label: str, noun: str, total: int, done: int = 0, every_s: float = 5.0, shown: bool = True
    ) -> None:
        """Start the display, and the clock of the elapsed time.

        Args:
          label: name of the whole work, at the start of every line.
          noun: name of a piece of work, such as `step`.
          total: number of pieces of work.
          done: number of pieces that are done already.
          every_s: smallest number of seconds between two lines, where no terminal shows a bar.  The first and the last piece
            always have a line.
          shown: whether anything is printed.
        """
        super().__init__(TEXT, rich.TimeElapsedColumn(), "left", rich.TimeRemainingColumn(), shown=shown)
        self.label, self.noun, self.total, self.done, self.every_s = label, noun, total, done, every_s
        self._task = self._bars.add_task(f"{label}: {noun}", total=total, completed=done, text="")
        self._last_line = -math.inf
        self._first: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """Print a line that begins with the label.  It stays above the bar if there is one."""
        self._print(f"{self.label}: {text}")

    def advance(self, count: int, text: str = "") -> bool:
        """Count `count` more pieces as done, and show `text` beside the count.

        Returns:
          Whether `every_s` seconds had passed since the last line, or all pieces are done.
        """
        self.done += count
        self._bars.update(self._task, completed=self.done, text=text)
        now, left = time.monotonic(), self._left()
        if now - self._last_line < self.every_s and self.done < self.total:
            return False
        self._last_line = now
        if not self._live:
            self.say("  ".join(filter(None, [f"{self.noun} {self.done}/{self.total}", text, left])))
        return True

    def _left(self) -> str:
        """Return the time left as text.  The pace is measured from the first `advance` on, so that a compilation does not count."""
        now = time.monotonic()
        done, began = self._first = self._first or (self.done, now)
        if self.done == done:
            return ""
        return f"{(now - began) / (self.done - done) * (self.total - self.done):.0f} s left"


class SweepProgress(_Bars):
    """Shows a bar for each run of a sweep that is in progress, and a bar for all runs together."""

    def __init__(self, workdir: Path, total: int, done: int):
        """Show a sweep in the folder `workdir`.  It has `total` runs, of which `done` are done already."""
        super().__init__(TEXT)
        self.workdir, self.total, self.done = workdir, total, done
        self._before, self._ended, self._began = done, 0, time.monotonic()
        self._starts: dict[str, float] = {}
        self._tasks: dict[str, rich.TaskID] = {}
        self._all = self._bars.add_task("all runs", total=total, completed=done, text="")

    def __enter__(self):
        if self._before:
            self._print(f"{self._before} of {self.total} runs are done already")
        return super().__enter__()

    def started(self, name: str) -> None:
        """Show that the process of the run `name` has been started."""
        self._starts[name] = time.monotonic()
        self._tasks[name] = self._bars.add_task(name, total=None, text="starting")
        if not self._live:
            self._print(f"{name}: started")

    def update(self, running: Mapping[str, int]) -> None:
        """Show step and loss of each run in progress, from its metrics.jsonl.  `running` maps the run's name to train.steps."""
        if not self._live:
            return
        for name, steps in running.items():
            line = last_train_line(self.workdir / name / "metrics.jsonl")
            if line is not None and line["loss"] is not None:
                text = f"loss {line['loss']:.4f}"
                self._bars.update(self._tasks[name], total=steps, completed=line["step"], text=text)
        self._bars.update(self._all, completed=self.done, text=self._left())

    def ended(self, name: str, status: str) -> None:
        """Show that the process of the run `name` has ended with `status`."""
        self._ended += 1
        self.done += status in ("finished", "diverged")
        self._bars.remove_task(self._tasks.pop(name))
        took = time.monotonic() - self._starts.pop(name)
        self._print(f"{name}: {status} after {took:.0f} s ({self.done} of {self.total} runs done{self._left(', ')})")

    def _left(self, before: str = "") -> str:
        """Return the text `before` and the time left for all runs, at their pace since this command began.

        The result is empty until a run has ended, and if no run is left.
        """
        left = self.total - self._before - self._ended
        if not self._ended or not left:
            return ""
        seconds = (time.monotonic() - self._began) / self._ended * left
        return f"{before}about {datetime.timedelta(seconds=round(seconds))} left"


def last_train_line(path: Path) -> dict[str, Any] | None:
    """Return the newest complete train line in the last 64 KiB of the metrics.jsonl at `path`, or None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for text in reversed(lines):
        if text.startswith(b'{"kind": "train"'):
            with contextlib.suppress(ValueError):
                return json.loads(text)
    return None
