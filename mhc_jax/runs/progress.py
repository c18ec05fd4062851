"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

TEXT = "{task.fields[text]}"


def _bars(console: Console, *columns: str | ProgressColumn) -> Progress:
    """Name, bar and count, then `columns`; nothing where the console is no terminal."""
    first = "[bold]{task.description}", BarColumn(), MofNCompleteColumn()
    return Progress(*first, *columns, console=console, disable=not console.is_terminal)


class Pace:
    """The time left, from the pace since the first call: what came before it, such as a compilation, does not count."""

    def __init__(self, total: int):
        self.total, self._first = total, None

    def left(self, done: int) -> str:
        """`  12 s left` once `done` of the total are done; empty while there is no pace yet."""
        now = time.monotonic()
        began, at = self._first = self._first or (done, now)
        return f"  {(now - at) / (done - began) * (self.total - done):.0f} s left" if done > began else ""


class RunProgress:
    """Shows step, loss, tokens/s and time left.  Use as a context manager."""

    def __init__(self, label: str, total: int, start: int = 0, every_s: float = 5.0):
        """Plain lines come at most every `every_s` seconds."""
        self.label, self.total, self.every_s = label, total, every_s
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._pace = Pace(total)
        if self._console.is_terminal:
            self._bar = _bars(self._console, TEXT, TimeElapsedColumn(), "left", TimeRemainingColumn())
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
        now, left = time.monotonic(), self._pace.left(step)
        if step < self.total and now - self._last_line < self.every_s:
            return
        self._last_line = now
        print(f"{self.label}: step {step}/{self.total}  {text}{left}", file=sys.stderr, flush=True)


class NoProgress:
    """The progress of the processes that show nothing."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_) -> None:
        pass

    def say(self, text: str) -> None:
        """Nothing."""

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Nothing."""


class SweepProgress:
    """One view of a sweep: a line for every running run and one for the whole; plain lines when not on a terminal."""

    def __init__(self, workdir: Path, total: int, done: int, workers: int):
        """`done` of the `total` runs were done before; `workers` run side by side."""
        self.workdir, self.total, self.done, self.workers = workdir, total, done, workers
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._before, self._ended, self._began = done, 0, time.monotonic()
        self._starts: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars = _bars(self._console, TEXT)
        self._all = self._bars.add_task("all runs", total=total, completed=done, text="")

    def __enter__(self) -> SweepProgress:
        self._bars.start()
        if self._before:
            self._say(f"{self._before} of {self.total} runs are done already")
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def started(self, name: str) -> None:
        """A process has been started for the run."""
        self._starts[name] = time.monotonic()
        self._tasks[name] = self._bars.add_task(name, total=None, text="starting")
        if not self._console.is_terminal:
            self._say(f"{name}: started")

    def update(self, running: Mapping[str, int]) -> None:
        """Read the newest line of each running run's metrics; `running`: name to its number of steps."""
        if not self._console.is_terminal:
            return
        for name, steps in running.items():
            line = last_train_line(self.workdir / name / "metrics.jsonl")
            if line is not None and line["loss"] is not None:
                self._bars.update(
                    self._tasks[name], total=steps, completed=line["step"], text=f"loss {line['loss']:.4f}"
                )
        self._bars.update(self._all, completed=self.done, text=self._left())

    def ended(self, name: str, status: str) -> None:
        """The process of the run has ended."""
        self._ended += 1
        self.done += status in ("finished", "diverged")
        self._bars.remove_task(self._tasks.pop(name))
        took = time.monotonic() - self._starts.pop(name)
        self._say(f"{name}: {status} after {took:.0f} s ({self.done} of {self.total} runs done{self._left(', ')})")

    def _left(self, before: str = "") -> str:
        """Time left, from the pace of this call so far."""
        left = self.total - self._before - self._ended
        if not self._ended or not left:
            return ""
        seconds = (time.monotonic() - self._began) / self._ended * left
        return f"{before}about {datetime.timedelta(seconds=round(seconds))} left"

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def last_train_line(path: Path) -> dict[str, Any] | None:
    """The newest whole training line among the last 64 KiB of a metrics.jsonl."""
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


class WorkProgress:
    """Pieces of work that take minutes and cannot say how far they are: what is being done and for how long, and what is done."""

    def __init__(self, label: str, total: int):
        self.label, self.name, self._began = label, "", time.monotonic()
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._bar = _bars(self._console, TEXT, TimeElapsedColumn())
        self._task = self._bar.add_task(label, total=total, text="")

    def __enter__(self) -> WorkProgress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def started(self, name: str) -> None:
        """A piece begins."""
        self.name, self._began = name, time.monotonic()
        self._bar.update(self._task, text=name)
        if not self._console.is_terminal:
            print(f"{self.label}: {name} ...", file=sys.stderr, flush=True)

    def said(self, text: str) -> None:
        """What came of the piece: a line that stays."""
        line = f"{self.label}: {self.name}: {text} after {time.monotonic() - self._began:.0f} s"
        if self._console.is_terminal:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def done(self) -> None:
        """One more of the total."""
        self._bar.advance(self._task)


class ItemProgress:
    """Many alike pieces of work: how many are done and how long the others will take."""

    def __init__(self, label: str, noun: str, total: int, every_s: float = 10.0):
        """Plain lines come at most every `every_s` seconds."""
        self.label, self.noun, self.total, self.every_s, self.count = label, noun, total, every_s, 0
        self._last, self._pace = time.monotonic(), Pace(total)
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._bar = _bars(self._console, TimeElapsedColumn(), "left", TimeRemainingColumn())
        self._task = self._bar.add_task(f"{label}: {noun}", total=total)

    def __enter__(self) -> ItemProgress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, count: int, now_and_then: Callable[[], None] | None = None) -> None:
        """`count` more are done; `now_and_then` is called when a line is due."""
        self.count += count
        self._bar.advance(self._task, count)
        now, left = time.monotonic(), self._pace.left(self.count)
        if now - self._last < self.every_s and self.count < self.total:
            return
        self._last = now
        if now_and_then:
            now_and_then()
        if not self._console.is_terminal:
            print(f"{self.label}: {self.noun} {self.count}/{self.total}{left}", file=sys.stderr, flush=True)
