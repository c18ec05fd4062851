"""Kill a command again and again until it ends, and compare its end with that of a command that was left alone."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import time
from pathlib import Path

from campaign import digests, processes
from campaign.cases import CASES, Case, Place
from campaign.faults import Fault
from campaign.processes import Child
from campaign.trials import Part, Trial

SETTLE_S = 60.0
"""Seconds in which all processes of a life must have ended after its command."""
LEFT = "was left to another sweep"
"""What a sweep says that ends because other processes train its runs."""
PLAIN = 0.04
"""Share of starts that are whole new interpreters."""


def part(place: Place) -> Part:
    """Return the part of the campaign that kills."""
    weights = {name: case.weight for name, case in CASES.items()}
    return Part("kills", weights, lambda trial, rng: life(place, CASES[trial.case], trial, rng), weight=5)


@dataclasses.dataclass
class Moment:
    """When a start is killed: after some seconds, at a write operation, or shortly after one."""

    seconds: float | None = None
    fault: Fault | None = None
    worker: bool = False
    """Whether a worker of the command is killed in place of the command."""

    @property
    def kind(self) -> str:
        what = "random" if self.fault is None else "at a write" if self.fault.action == "kill" else "after a write"
        return f"{what} (worker)" if self.worker else what


def moment(case: Case, place: Place, life: Path, rng: random.Random) -> Moment:
    """Draw a moment: half of them uniform over the life of the command, the others at or after any of its write operations."""
    reference = place.reference(case)
    worker = case.workers > 0 and rng.random() < 0.4
    if rng.random() < 0.5:
        return Moment(rng.uniform(0, reference.seconds), worker=worker)
    operations = 45 if worker else len(reference.operations)
    action = rng.choice(["kill", "alarm"])
    at, delay = rng.randint(1, max(1, operations)), 10 ** rng.uniform(-4, -1)
    number = rng.randrange(case.workers) if worker else -1
    return Moment(fault=Fault(str(life), action, at, delay_s=delay, worker=number), worker=worker)


def life(place: Place, case: Case, trial: Trial, rng: random.Random) -> None:
    """Run one life of a case: start it, kill it, and so on, then let it end and compare."""
    if reason := case.missing():
        trial.verdict, trial.detail = "skipped", reason
        return
    reference = place.reference(case)
    folder = fresh(place, trial)
    case.prepare(place, folder)
    kills = rng.randint(1, case.kills)
    while True:
        last = trial.kills >= kills
        drawn = Moment() if last else moment(case, place, folder, rng)
        plain = drawn.fault is None and rng.random() < PLAIN
        children = case.start(place, folder, drawn.fault, first=rng.randrange(8) % processes_of(case), plain=plain)
        trial.restarts += trial.kills > 0
        killed = befall(drawn, children, place.patience_s, rng)
        if killed is None:
            trial.fail("hang", f"still there after {place.patience_s} s: {children[0].said[-1500:]}")
            break
        if killed:
            trial.kills += 1
            trial.count(drawn.kind)
            continue
        if case.done and trial.kills and case.done in children[0].said:
            break
        if LEFT in children[0].said and trial.restarts < 40:
            continue  # A worker of the killed sweep still saves its run.
        if any(child.status for child in children):
            said = next(child for child in children if child.status).said
            trial.fail("not restarted", f"{[c.status for c in children]} after {trial.kills} kills: {said[-2000:]}")
        elif last:
            reference.seconds += 0.3 * (time.monotonic() - children[0].began - reference.seconds)
        break
    check_end(place, case, trial, folder)


def processes_of(case: Case) -> int:
    """Return the number of commands that a case starts at once."""
    words = case.name.split()
    return int(words[2]) if "processes" in words else 1


def befall(drawn: Moment, children: list[Child], patience_s: float, rng: random.Random) -> bool | None:
    """Wait for the drawn moment, kill, and wait for the ends.

    Returns:
      Whether a kill has happened.  False: all commands ended by themselves.  None: a command hung.
    """
    end = time.monotonic() + patience_s
    strike = time.monotonic() + drawn.seconds if drawn.seconds is not None else None
    victim = rng.choice(children)
    struck = False
    while any(child.poll() is None for child in children):
        now = time.monotonic()
        if strike is not None and now >= strike and not struck:
            struck = _strike(victim, drawn.worker)
            strike = now + 0.05 if not struck else None  # no worker is there yet
        gone = [child for child in children if child.status in (-signal.SIGKILL, -signal.SIGALRM)]
        if gone and len(children) > 1:
            # The others find out by themselves, or the scheduler ends the whole job.
            return _end_job(children, rng.choice([0, 0, rng.uniform(0, 2), patience_s]), patience_s)
        if now > end:
            for child in children:
                child.kill()
            return None
        time.sleep(processes.POLL_S)
    if any(child.status in (-signal.SIGKILL, -signal.SIGALRM) for child in children):
        return True
    # A sweep whose worker was killed ends by itself, with status 1, and the same command goes on.
    return drawn.worker and all(child.status == 1 for child in children)


def _strike(victim: Child, worker: bool) -> bool:
    """Kill a command, or one of its workers; return whether there was one."""
    if not worker:
        victim.kill()
        return True
    workers = processes.descendants(victim.pid)
    if workers:
        try:
            os.kill(workers[0], signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(workers)


def _end_job(children: list[Child], seconds: float, patience_s: float) -> bool | None:
    """Wait some seconds for the ends of all commands, then kill those that are left.  None: one has outlasted the patience."""
    end = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(processes.POLL_S)
    hung = seconds == patience_s and any(child.poll() is None for child in children)
    for child in children:
        child.kill()
    for child in children:
        child.wait(10)
    return None if hung else True


def fresh(place: Place, trial: Trial) -> Path:
    """Make an empty folder for a trial."""
    folder = place.scratch / "lives" / trial.seed.replace("/", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check_end(place: Place, case: Case, trial: Trial, folder: Path) -> None:
    """Compare the end of a life with the reference, look for stray processes, and remove the folder of a life that is in order."""
    if left := processes.strays(SETTLE_S):
        trial.fail("stray", left)
    if trial.verdict == "equal":
        lines = digests.differing(place.reference(case).digest, place.digest(case, folder))
        if lines:
            stray = all(line.startswith("files:") for line in lines)
            trial.fail("stray" if stray else "lost", "; ".join(lines))
    if trial.verdict in ("equal", "recovered", "refused"):
        shutil.rmtree(folder, ignore_errors=True)
