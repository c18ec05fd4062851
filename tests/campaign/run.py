"""The campaign: kill, starve, damage and fuzz the commands of this project for a given time, and count what is lost.

    python tests/campaign/run.py --minutes=60 --seed=0 --log=campaign.jsonl
    python tests/campaign/run.py --minutes=5 --only=kills --case=sweep,compare
    python tests/campaign/run.py --log=campaign.jsonl --replay=17

Every trial ends in one of four ways that are in order: the end is bitwise that of a command which nothing disturbed (equal), the
command says what it has left out or done again (recovered), it ends with a sentence and a status other than 0 (refused), or
something is missing here (skipped).  Everything else is a failure: a lost or doubled line, a traceback, a hang, a stray process
or file, a wrong result without a word.

The log has a line for each trial.  The same command goes on where a log ends.  `--replay=N` runs trial N of the log again, and
keeps its folder.  The table at the end counts all trials of the log.  Exit status: 0 no failure, 1 a failure, 2 a wrong call.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    path for path in map(str, (HERE.parent, HERE.parents[1], HERE.parents[1] / "kernels")) if path not in sys.path
]

from campaign import processes  # noqa: E402
from campaign.cases import Place  # noqa: E402
from campaign.trials import Log, Part, Trial, next_trial, table  # noqa: E402

ERROR = "error of the campaign"
NAMES = ("kills", "disk", "damage", "others", "fuzz", "numerics")


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="time of this call")
    parser.add_argument("--trials", type=int, default=0, help="trials of this call at most; 0: as many as fit the time")
    parser.add_argument("--seed", default="0", help="another seed tries other things")
    parser.add_argument("--log", type=Path, help="file of JSON lines; without it the log is not kept")
    parser.add_argument("--only", default="", help=f"parts with commas between them: {', '.join(NAMES)}")
    parser.add_argument("--case", default="", help="commands with commas between them, such as sweep,compare")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which a command counts as hung")
    parser.add_argument("--replay", type=int, default=0, help="number of the trial of the log to run again")
    parser.add_argument("--scratch", type=Path, help="folder for all files (default: a new one, which is removed)")
    given = parser.parse_args(arguments)
    scratch = (given.scratch or Path(tempfile.mkdtemp(prefix="campaign-"))).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    log = Log(given.log)
    try:
        processes.preload(scratch)
        place = Place(scratch, given.patience)
        parts = chosen(place, given.only, given.case)
        if given.replay:
            return replay(log, parts, given.replay, place)
        work(log, parts, place, given.seed, time.monotonic() + 60 * given.minutes, given.trials)
    finally:
        if not given.scratch and not given.replay and not log.failures():
            shutil.rmtree(scratch, ignore_errors=True)
    print(table(log))
    for trial in log.failures():
        print(
            f"\nTrial {trial.number} ({trial.part}, {trial.case}, seed {trial.seed}): {trial.verdict}\n{trial.detail}"
        )
    return 1 if log.failures() else 0


def chosen(place: Place, only: str, cases: str) -> list[Part]:
    """Return the parts and cases that were asked for."""
    from campaign import damage, disk, fuzz, kills, numerics, others

    every = [
        *(part(place) for part in (kills.part, disk.part, damage.part, others.part)),
        fuzz.part(place.scratch),
        numerics.part(),
    ]
    wanted, named = set(filter(None, only.split(","))), set(filter(None, cases.split(",")))
    if unknown := wanted - set(NAMES):
        sys.exit(f"--only has {', '.join(sorted(unknown))}; it may have {', '.join(NAMES)}")
    parts = []
    for part in every:
        weights = {name: weight for name, weight in part.weights.items() if not named or name in named}
        if weights and (not wanted or part.name in wanted):
            parts.append(Part(part.name, weights, part.run, part.weight, part.limit))
    return parts


def work(log: Log, parts: list[Part], place: Place, seed: str, end: float, most: int) -> None:
    """Run trials until the time is over, all limits are reached, `most` trials are run, or the campaign itself has an error."""
    done = 0
    while time.monotonic() < end and not (most and done >= most):
        drawn = next_trial(log, parts, seed)
        if drawn is None:
            return
        part, trial = drawn
        attempt(part, trial, place)
        log.add(trial)
        done += 1
        print(
            f"{trial.number} {trial.part}, {trial.case}: {trial.verdict}, {trial.kills} kills, {trial.seconds:.1f} s",
            flush=True,
        )
        if trial.verdict == ERROR:
            return


def attempt(part: Part, trial: Trial, place: Place) -> None:
    """Run one trial.  An error of the campaign itself is a failure, too."""
    began, references_s = time.monotonic(), place.references_s
    try:
        part.run(trial, random.Random(trial.seed))
    except Exception:
        trial.fail(ERROR, traceback.format_exc())
    trial.seconds = round(time.monotonic() - began - (place.references_s - references_s), 2)


def replay(log: Log, parts: list[Part], number: int, place: Place) -> int:
    """Run a trial of the log again, say what came of it, and keep its folder."""
    old = next((trial for trial in log.trials if trial.number == number), None)
    if old is None:
        sys.exit(f"--replay is {number}; the log has the trials 1 to {len(log.trials)}")
    part = next(part for part in parts if part.name == old.part)
    trial = Trial(old.part, old.case, old.seed)
    attempt(part, trial, place)
    print(
        f"{trial.part}, {trial.case}, seed {trial.seed}: {trial.verdict} (before: {old.verdict})\n{trial.detail}\n{place.scratch}"
    )
    return int(trial.verdict != "equal" and trial.verdict not in ("recovered", "refused", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
