"""What else befalls commands: signals, pauses, clocks that jump, two of everything at once, and a process that stalls.

Afterwards the same command must end as if nothing had ever happened.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from campaign import processes
from campaign.cases import CASES, Case, Place
from campaign.damage import judge
from campaign.faults import Fault
from campaign.kills import SETTLE_S, check_end, fresh
from campaign.processes import Child
from campaign.trials import Part, Trial

STOPPED = (0, 130, -signal.SIGINT, -signal.SIGTERM, 143, -signal.SIGKILL)
"""Statuses of a command that a signal may have ended.  A command that catches no signal dies of it."""
BUSY = ("is in use", "was left to another sweep", "is there already", "exists and is not empty", "has this run")
"""Words of the sentences by which the second of two equal commands gives way."""
LOST = (4, -signal.SIGABRT, 134)
"""Statuses of a process whose run has lost another one (`docs/run_folders.md`)."""
SIGNALLED = ("train", "train of 2 processes", "sweep", "compare", "evaluate", "tokenizing", "convert")


def part(place: Place) -> Part:
    """Return the part of the campaign with everything else."""
    weights = dict.fromkeys(KINDS, 1.0)
    return Part("others", weights, lambda trial, rng: _trial(place, KINDS[trial.case], trial, rng), weight=2)


def _trial(place: Place, kind: Callable, trial: Trial, rng: random.Random) -> None:
    names = NAMES[trial.case]
    case = CASES[rng.choice([name for name in names if not CASES[name].missing()])]
    trial.count(case.name)
    place.reference(case)
    folder = fresh(place, trial)
    case.prepare(place, folder)
    kind(place, case, trial, rng, folder)
    if trial.verdict != "equal":
        processes.strays(SETTLE_S)
        return
    check_end(place, case, trial, folder)


def _go_on(place: Place, case: Case, trial: Trial, folder: Path) -> None:
    """Run the same command once more, which must end well."""
    if trial.verdict != "equal":
        return
    children = case.start(place, folder)
    trial.restarts += 1
    if judge(place, trial, children) and not (case.done and case.done in children[0].said):
        trial.fail("not restarted", f"{[child.status for child in children]}: {children[0].said[-2000:]}")


def _wait(place: Place, trial: Trial, children: list[Child], allowed: tuple[int, ...]) -> None:
    """Wait for commands, which must end with an allowed status, and without a traceback unless a signal ended them."""
    for child in children:
        if child.wait(place.patience_s) is None:
            child.kill()
            child.wait(10)
            trial.fail("hang", f"still there after {place.patience_s} s: {child.said[-1500:]}")
        elif child.status not in allowed:
            trial.fail("status", f"status {child.status}: {child.said[-2000:]}")
    if left := processes.strays(SETTLE_S):
        trial.fail("stray", left)


def stopped(numbers: tuple[int, ...], pause_s: float) -> Callable:
    """Return a kind of trial: each signal of `numbers` comes after the one before it by at most `pause_s` seconds."""

    def run(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path) -> None:
        children = case.start(place, folder)
        time.sleep(rng.uniform(0, place.reference(case).seconds))
        for number in numbers:
            for child in children:
                child.kill(number)
            time.sleep(rng.uniform(0, pause_s))
        _wait(place, trial, children, (*STOPPED, *(LOST if len(children) > 1 else ())))
        if "Traceback" in children[0].said and "KeyboardInterrupt" not in children[0].said:
            trial.fail("traceback", children[0].said[-2500:])
        _go_on(place, case, trial, folder)

    return run


def paused(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path) -> None:
    """Pause all commands several times."""
    children = case.start(place, folder)
    while any(child.poll() is None for child in children):
        time.sleep(rng.uniform(0, place.reference(case).seconds / 2))
        for number, seconds in ((signal.SIGSTOP, rng.uniform(0, 1.0)), (signal.SIGCONT, 0)):
            for child in children:
                child.kill(number)
            time.sleep(seconds)
        if time.monotonic() - children[0].began > place.patience_s:
            break
    if judge(place, trial, children):
        trial.fail("status", f"{[child.status for child in children]}: {children[0].said[-2000:]}")


def clock(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path) -> None:
    """Let the clock of the command and of its workers jump.  Orbax may then take a save for one that took too long, and say so."""
    children = case.start(place, folder, Fault(str(folder), clock=rng.randrange(1, 1 << 30)))
    if judge(place, trial, children):
        trial.count("a sentence")
        _go_on(place, case, trial, folder)


def twice(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path) -> None:
    """Start the same command twice, the second one up to a life later; each ends well, or gives way in a sentence."""
    first = case.start(place, folder)
    time.sleep(rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0, place.reference(case).seconds)]))
    both = [*first, *case.start(place, folder)]
    status = judge(place, trial, both)
    for child in both:
        if child.status and not any(words in child.said for words in BUSY):
            trial.fail("status", f"status {child.status}: {child.said[-2000:]}")
    if status and trial.verdict == "equal" and all(child.status for child in both):
        _go_on(place, case, trial, folder)


def stalled(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path) -> None:
    """Stop one process of several.  The others must end; then all are killed, and the same command goes on."""
    children = case.start(place, folder)
    time.sleep(rng.uniform(0, place.reference(case).seconds))
    victim = rng.choice(children)
    victim.kill(signal.SIGSTOP)
    others = [child for child in children if child is not victim]
    end = time.monotonic() + place.patience_s
    while any(child.poll() is None for child in others) and time.monotonic() < end:
        time.sleep(processes.POLL_S)
    hung = [child for child in others if child.poll() is None]
    if hung:
        trial.fail("hang", f"a process waits for a stalled one: {hung[0].said[-1500:]}")
    trial.count("others: " + ", ".join(sorted({str(child.status) for child in others})))
    for child in children:
        child.kill()
        child.wait(10)
    _go_on(place, case, trial, folder)


KINDS: dict[str, Callable] = {
    "SIGTERM": stopped((signal.SIGTERM,), 0),
    "SIGINT": stopped((signal.SIGINT,), 0),
    "SIGINT twice": stopped((signal.SIGINT, signal.SIGINT), 1.0),
    "SIGSTOP and SIGCONT": paused,
    "a clock that jumps": clock,
    "two at once": twice,
    "a stalled process": stalled,
}
"""What befalls a command, by name."""
NAMES = dict.fromkeys(list(KINDS)[:3], SIGNALLED) | {
    "SIGSTOP and SIGCONT": ("train", "train of 2 processes", "sweep"),
    "a clock that jumps": ("train", "sweep", "compare", "record", "report", "evaluate"),
    "two at once": ("train", "sweep", "compare", "record", "report", "tokenizer", "tokenizing", "convert", "evaluate"),
    "a stalled process": ("train of 2 processes", "train of 4 processes"),
}
"""The commands that it may befall."""
