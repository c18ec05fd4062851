"""Show the progress of work on standard error: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich import progress as rich
from rich.console import Console
from rich.text import Text

TOLD_S = 1.0
"""Work that takes at least this many seconds has a line at its end that tells its time."""
SWEEP_LINES_S = 30.0
"""Number of seconds between two lines about a run of a sweep, where no terminal shows bars."""


class _Count(rich.MofNCompleteColumn):
    """The column that says how many of all pieces are done.  It is empty for work whose length is not known."""

    def render(self, task: rich.Task) -> Text:
        return Text() if task.total is None else super().render(task)


class Display:
    """A context manager that prints lines and shows progress bars, each with a name, a bar, a count, a text and a time."""

    def __init__(self, label: str, every_s: float = 5.0, shown: bool = True, timed: bool = True):
        """Prepare the display.

        Args:
          label: name of the whole work, at the start of every line.
          every_s: smallest number of seconds between two lines, where no terminal shows a bar.
          shown: whether anything is printed.
          timed: whether a bar shows the time since its start.
        """
        console = Console(file=sys.stderr, soft_wrap=True)
        self.label, self.every_s = label, every_s
        self._shown, self._live = shown, shown and console.is_terminal
        name = rich.TextColumn("{task.description}", style="bold", markup=False)
        text = rich.TextColumn("{task.fields[text]}", markup=False)
        columns = name, rich.BarColumn(), _Count(), text, *([rich.TimeElapsedColumn()] if timed else [])
        self._bars = rich.Progress(*columns, console=console, disable=not self._live)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line that begins with the label.  It stays above the bars if there are any."""
        self._print(f"{self.label}: {text}")

    @contextlib.contextmanager
    def during(self, work: str) -> Iterator[Callable[[str], None]]:
        """Show that `work`, whose length is not known, goes on, and for how long.

        A terminal shows a moving bar.  Elsewhere a line ends with dots.  Another line tells the time of long work at its end.

        Yields:
          a function that shows how much is done, as text.
        """
        began = last = time.monotonic()
        task = self._bars.add_task(f"{self.label}: {work}", total=None, text="")
        if not self._live:
            self.say(f"{work} ...")

        def update(text: str) -> None:
            nonlocal last
            self._bars.update(task, text=text)
            now = time.monotonic()
            if not self._live and now - last >= self.every_s:
                last = now
                self.say(f"{work}: {text}, {duration(now - began)}")

        try:
            yield update
        finally:
            self._bars.remove_task(task)
        if (took := time.monotonic() - began) >= TOLD_S:
            self.say(f"{work} took {duration(took)}")

    def _print(self, line: str) -> None:
        if self._live:
            self._bars.console.print(line, highlight=False, markup=False)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


class Progress(Display):
    """Shows how many of `total` pieces of work, such as steps, are done, and how long the remaining pieces will take."""

    def __init__(
        self, label: str, noun: str, total: int, done: int | None = 0, every_s: float = 5.0, shown: bool = True
    ) -> None:
        """Prepare the display.

        Args:
          label: name of the whole work, at the start of every line.
          noun: name of a piece of work, such as `step`.
          total: number of pieces of work.
          done: number of pieces that are done already.  None: `begin` will tell it, and the bar appears then.
          every_s: as in `Display`.  The first and the last piece always have a line.
          shown: whether anything is printed.
        """
        super().__init__(label, every_s, shown)
        self.noun, self.total, self.done = noun, total, 0
        self._last_line = -math.inf
        self._first: tuple[int, float] | None = None
        if done is not None:
            self.begin(done)

    def begin(self, done: int) -> None:
        """Show the bar, with `done` pieces done, and start the clock of the elapsed time."""
        self.done = done
        self._task = self._bars.add_task(f"{self.label}: {self.noun}", total=self.total, completed=done, text="")

    def advance(self, count: int, text: str = "") -> bool:
        """Count `count` more pieces as done, and show `text` and the time left beside the count.

        Returns:
          Whether `every_s` seconds had passed since the last line, or all pieces are done.
        """
        self.done += count
        now = time.monotonic()
        shown = "  ".join(filter(None, [text, self._left(now)]))
        self._bars.update(self._task, completed=self.done, text=shown)
        if now - self._last_line < self.every_s and self.done < self.total:
            return False
        self._last_line = now
        if not self._live:
            self.say("  ".join(filter(None, [f"{self.noun} {self.done}/{self.total}", shown])))
        return True

    def _left(self, now: float) -> str:
        """Return the time left as text, which is empty before the second `advance`.

        The pace is measured from the first `advance` on, so that a compilation does not count.
        """
        done, began = self._first = self._first or (self.done, now)
        if self.done == done:
            return ""
        return f"{duration((now - began) / (self.done - done) * (self.total - self.done))} left"


class SweepProgress(Display):
    """Shows the state of each run of a sweep that is not done, and a bar for all runs together.

    A run is waiting, starting, at some work such as compiling, at a step, or has ended.  What it does between start and end is the
    newest line of the kinds `name: work ...` and `name: step 3/8  ...` in its log.
    """

    def __init__(self, workdir: Path, runs: Mapping[str, int], done: int):
        """Show a sweep in the folder `workdir`.

        Args:
          workdir: folder of the sweep.
          runs: number of steps of each run that is not done, by name, in the order in which they will be trained.
          done: number of runs that are done already.
        """
        super().__init__("all runs", SWEEP_LINES_S, timed=False)
        self.workdir, self.total, self.done = workdir, len(runs) + done, done
        self._before, self._ended, self._began = done, 0, time.monotonic()
        self._active: dict[str, tuple[float, int]] = {}  # when each run was started, and how long its log was
        self._told: dict[str, tuple[float, str]] = {}  # when each run had its last line, and which
        self._all = self._bars.add_task("all runs", total=self.total, completed=done, text="")
        self._tasks = {name: self._bars.add_task(name, total=steps, text="waiting") for name, steps in runs.items()}

    def __enter__(self):
        if self._before:
            self._print(f"{self._before} of {self.total} runs are done already")
        return super().__enter__()

    def started(self, name: str) -> None:
        """Show that the process of the run `name` has been started."""
        log, now = self._log(name), time.monotonic()
        self._active[name] = now, log.stat().st_size if log.exists() else 0
        self._told[name] = now, "starting"
        self._bars.update(self._tasks[name], text="starting")
        if not self._live:
            self._print(f"{name}: started ({len(self._tasks) - len(self._active)} waiting)")

    def waits(self, name: str) -> None:
        """Show that the run `name` has not begun after all, because another process trains it."""
        del self._active[name]
        self._bars.update(self._tasks[name], text="waiting for another process")

    def update(self) -> None:
        """Show what each run in progress does.  Without a terminal, a run has a line every `SWEEP_LINES_S` seconds at most."""
        now = time.monotonic()
        for name, (_, start) in self._active.items():
            state, step = state_of(self._log(name), start, name)
            _, _, after = state.partition("  ") if step else ("", "", state)
            self._bars.update(self._tasks[name], completed=step, text=after)
            last, told = self._told[name]
            if not self._live and state != told and now - last >= self.every_s:
                self._told[name] = now, state
                self._print(f"{name}: {state}")
        self._bars.update(self._all, completed=self.done, text=self._left())

    def ended(self, name: str, status: str) -> None:
        """Show that the process of the run `name` has ended with `status`."""
        self._ended += 1
        self.done += status in ("finished", "diverged")
        self._bars.remove_task(self._tasks.pop(name))
        took = duration(time.monotonic() - self._active.pop(name)[0])
        self._print(f"{name}: {status} after {took} ({self.done} of {self.total} runs done{self._left(', ')})")

    def _log(self, name: str) -> Path:
        return self.workdir / "logs" / f"{name}.log"

    def _left(self, before: str = "") -> str:
        """Return the text `before` and the time left for all runs, at their pace since this command began.

        The result is empty until a run has ended, and if no run is left.
        """
        left = self.total - self._before - self._ended
        if not self._ended or not left:
            return ""
        return f"{before}about {duration((time.monotonic() - self._began) / self._ended * left)} left"


def state_of(log: Path, start: int, name: str) -> tuple[str, int]:
    """Return what the run `name` does and its step (0 before the first), from the last 64 KiB of its log after byte `start`."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    found = re.findall(rf"^{re.escape(name)}: (?:(step (\d+)/\d+.*)|(.*) \.\.\.)\n", text, re.MULTILINE)
    if not found:
        return "starting", 0
    at_step, step, work = found[-1]
    return at_step or work, int(step or 0)


def duration(seconds: float) -> str:
    """Return a time as text: in seconds below two minutes, else as hours, minutes and seconds.

    >>> duration(7.4), duration(3725.0)
    ('7 s', '1:02:05')
    """
    return f"{seconds:.0f} s" if seconds < 120 else str(datetime.timedelta(seconds=round(seconds)))
