"""Disks that fill up or become read-only at random moments, and write operations that fail.

Each trial has a small tmpfs of its own for what the command writes, where mounting is allowed.  A file that takes all free
room fills it at a random moment.  A disk that becomes read-only is remounted so as soon as no file on it is open for writing; a run
keeps metrics.jsonl open, so that a second tmpfs holds its checkpoints.  Where mounting is not allowed, operations fail by an audit
hook alone (`faults.Fault`).

A command must end in a sentence, or as if nothing had happened.  Then the disk is mended, and the same command must end as if
nothing had ever happened.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from campaign import digests, processes
from campaign.cases import CASES, Case, Place
from campaign.damage import judge, killed
from campaign.faults import Fault
from campaign.kills import fresh
from campaign.processes import Child
from campaign.trials import Part, Trial

SIZE = 64 << 20
"""Bytes of a small disk."""
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES)
NAMES = ("train", "sweep", "evaluate", "record", "report", "tokenizer", "tokenizing", "convert")


def part(place: Place) -> Part:
    """Return the part of the campaign about disks."""
    weights = {name: CASES[name].weight for name in NAMES}
    return Part("disk", weights, lambda trial, rng: _trial(place, CASES[trial.case], trial, rng), weight=2)


@functools.cache
def mounting() -> str:
    """Return why no file system can be mounted here, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.stderr.strip()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small tmpfs on a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        _remount(folder, "rw")
        subprocess.run(["umount", "--lazy", folder], check=True)


def _remount(folder: Path, how: str) -> bool:
    done = subprocess.run(["mount", "-o", f"remount,{how},size={SIZE}", folder], capture_output=True)
    return done.returncode == 0


def _trial(place: Place, case: Case, trial: Trial, rng: random.Random) -> None:
    if reason := case.missing():
        trial.verdict, trial.detail = "skipped", reason
        return
    place.reference(case)
    kind = rng.choice(["fails once", "fails from then on"] + ([] if mounting() else ["full", "full", "read-only"]))
    trial.count(kind if not mounting() else f"{kind} (no mounting: {mounting()})")
    folder = fresh(place, trial)
    case.prepare(place, folder)
    if "fails" in kind:
        _failing(place, case, trial, rng, folder, kind == "fails from then on")
    else:
        # Checkpoints have a disk of their own where the disk of the run would be busy all the time.
        inner = "out/run/checkpoints" if kind == "read-only" and case.name == "train" else "out"
        if inner != "out":  # The run has begun: it takes no folder that it has not made.
            shutil.copytree(killed(place, "train") / "out", folder / "out")
        shutil.copytree(folder / "out", folder / "kept") if (folder / "out").exists() else None
        with small_disk(folder / inner) as disk:
            if (folder / "kept").exists():
                shutil.copytree(folder / "kept", folder / "out", dirs_exist_ok=True)
            (_full if kind == "full" else _read_only)(place, case, trial, rng, folder, disk)
            _go_on(place, case, trial, folder)
    if trial.verdict in ("equal", "refused"):
        shutil.rmtree(folder, ignore_errors=True)


def _failing(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path, lasting: bool) -> None:
    at = rng.randint(1, len(place.reference(case).operations))
    number = rng.choice(ERRORS)
    trial.count(errno.errorcode[number])
    _end(place, trial, case.start(place, folder, Fault(str(folder), "error", at, errno=number, lasting=lasting)))
    _go_on(place, case, trial, folder)


def _full(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path, disk: Path) -> None:
    """Fill a disk but for a few kB at a random moment."""
    left = rng.choice([0, 0, 4096, rng.randrange(1 << 20)])
    balloon = disk / ".balloon"
    _at_moment(place, case, trial, rng, folder, lambda: _inflate(balloon, disk, left))
    balloon.unlink(missing_ok=True)


def _inflate(balloon: Path, disk: Path, left: int) -> bool:
    free = os.statvfs(disk)
    with contextlib.suppress(OSError), balloon.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
    return True


def _read_only(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path, disk: Path) -> None:
    _at_moment(place, case, trial, rng, folder, lambda: _remount(disk, "ro"))
    _remount(disk, "rw")


def _at_moment(place: Place, case: Case, trial: Trial, rng: random.Random, folder: Path, harm) -> None:
    """Start the command, and try at a random moment and from then on to harm its disk until that works."""
    at = time.monotonic() + rng.uniform(0, place.reference(case).seconds)
    children = case.start(place, folder)
    while any(child.poll() is None for child in children):
        if time.monotonic() > at and harm():
            break
        time.sleep(processes.POLL_S)
    _end(place, trial, children)


def _end(place: Place, trial: Trial, children: list[Child]) -> None:
    if judge(place, trial, children):
        trial.verdict, trial.detail = "refused", children[0].said.strip()[-300:]


def _go_on(place: Place, case: Case, trial: Trial, folder: Path) -> None:
    """Run the same command on a disk that is in order, and compare its end."""
    if trial.verdict not in ("equal", "refused"):
        return
    children = case.start(place, folder)
    trial.restarts += 1
    verdict, trial.verdict = trial.verdict, "equal"
    status = judge(place, trial, children)
    if status is None:
        return
    if status and not (case.done and case.done in children[0].said):
        trial.fail("not restarted", f"status {status}: {children[0].said[-2000:]}")
        return
    lines = digests.differing(place.reference(case).digest, place.digest(case, folder))
    if lines:
        trial.fail("stray" if all(line.startswith("files:") for line in lines) else "lost", "; ".join(lines))
        return
    trial.verdict = verdict
