"""What a trial is, and the log of trials from which the campaign goes on, is counted, and is replayed."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOOD = ("equal", "recovered", "refused", "skipped")
"""Verdicts that are no failure: the result of an undisturbed command, a recovery that says so, a refusal in a sentence."""


@dataclass
class Trial:
    """One trial: the part and the case of the campaign, its seed, and what came of it."""

    part: str
    case: str
    seed: str
    """The seed, which alone decides what is tried (for random moments: up to the speed of the machine)."""
    verdict: str = "equal"
    """One of `GOOD`, or else what went wrong in a word: lost, traceback, hang, stray, unlike, silent, not restarted."""
    moments: dict[str, int] = field(default_factory=dict)
    """How often each kind of moment, fault or damage was tried in this trial."""
    kills: int = 0
    restarts: int = 0
    tried: int = 1
    """Number of inputs, problems or faults."""
    detail: str = ""
    seconds: float = 0.0
    number: int = 0

    def fail(self, verdict: str, detail: object) -> Trial:
        """Note a failure, unless one is noted already, and return this trial."""
        if self.verdict in GOOD:
            self.verdict, self.detail = verdict, str(detail)[-3000:]
        return self

    def count(self, moment: str) -> None:
        """Count a moment."""
        self.moments[moment] = self.moments.get(moment, 0) + 1


@dataclass(frozen=True)
class Part:
    """A part of the campaign: its cases with their weights, and the function that runs one trial of a case."""

    name: str
    weights: Mapping[str, float]
    run: Callable[[Trial, random.Random], None]
    weight: float = 1.0
    limit: int = 0
    """Most trials of each case; 0: no limit."""


class Log:
    """A file of JSON lines, one for each trial.  A torn last line of a campaign that was killed is cut off."""

    def __init__(self, path: Path | None):
        self.path, self.trials = path, list[Trial]()
        if path and path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            path.write_bytes(whole)
            self.trials = [Trial(**json.loads(line)) for line in whole.decode().splitlines()]

    def add(self, trial: Trial) -> None:
        """Give a trial its number, and append it to the file."""
        trial.number = len(self.trials) + 1
        self.trials.append(trial)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(trial)) + "\n")

    def of(self, part: str, case: str = "") -> list[Trial]:
        """Return the trials of a part, or of one of its cases."""
        return [t for t in self.trials if t.part == part and case in ("", t.case)]

    def failures(self) -> list[Trial]:
        """Return the trials that failed."""
        return [trial for trial in self.trials if trial.verdict not in GOOD]


def next_trial(log: Log, parts: Sequence[Part], seed: str) -> tuple[Part, Trial] | None:
    """Return the part and the case that have had the smallest share of the time so far, as a trial to run.

    A part has the share of time of its weight, and so has a case within its part.  None: all limits are reached.
    A case that is skipped here is not drawn again.
    """

    def spent(part: str, case: str = "") -> float:
        return sum(trial.seconds + 0.01 for trial in log.of(part, case))

    def open_cases(part: Part) -> list[str]:
        """Return the cases that can run here and have had fewer trials than the limit."""
        tried = {case: log.of(part.name, case) for case in part.weights}
        return [
            case
            for case, trials in tried.items()
            if (not part.limit or len(trials) < part.limit) and not any(t.verdict == "skipped" for t in trials)
        ]

    waiting = [part for part in parts if open_cases(part)]
    if not waiting:
        return None
    part = min(waiting, key=lambda p: spent(p.name) / p.weight)
    case = min(open_cases(part), key=lambda name: spent(part.name, name) / part.weights[name])
    return part, Trial(part.name, case, f"{seed}/{part.name}/{case}/{len(log.of(part.name, case))}")


def table(log: Log) -> str:
    """Return the trials as a Markdown table, with a row for each case."""
    head = ("part", "command", "trials", "tried", "kills", "moments", "restarts", "ends", "failures")
    rows = [head, ("---",) * len(head)]
    for part, case in dict.fromkeys((trial.part, trial.case) for trial in log.trials):
        trials = log.of(part, case)
        moments: collections.Counter[str] = collections.Counter()
        for trial in trials:
            moments.update(trial.moments)
        ends = collections.Counter(trial.verdict for trial in trials)
        sums: list[Any] = [sum(getattr(trial, name) for trial in trials) for name in ("tried", "kills", "restarts")]
        rows.append(
            (
                *(part, case, len(trials), *sums[:2], _listed(moments), sums[2], _listed(ends)),
                sum(trial.verdict not in GOOD for trial in trials),
            )
        )
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _listed(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in most[:9]) + (
        "" if len(most) <= 9 else f", {len(most) - 9} more kinds"
    )
