"""Damage one file of what a command reads: cut, emptied, flipped, torn, swapped, removed, or replaced by a folder.

The command then runs.  It may leave what it leaves without damage, say what it has mended or left out, or refuse in a sentence.
A number that is wrong without a word is a failure, and so are a traceback and a hang.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from campaign import digests, processes
from campaign.cases import CASES, Case, Place
from campaign.faults import Fault
from campaign.kills import fresh
from campaign.processes import Child, Command
from campaign.trials import Part, Trial
from mhc_jax.files.checksums import CHECKSUMS

KINDS = ("cut", "empty", "flipped bit", "torn", "swapped", "removed", "a folder", "zeros")


@dataclass(frozen=True)
class Reader:
    """A command and the files that it reads.  `ready` makes them in the folder of a trial, before one of them is damaged."""

    case: Case
    ready: Callable[[Place, Path], None]
    below: str
    """Folder of the files that may be damaged, in the folder of the trial."""
    weight: float = 1.0


def part(place: Place) -> Part:
    """Return the part of the campaign that damages files."""
    weights = {name: reader.weight for name, reader in READERS.items()}
    return Part("damage", weights, lambda trial, rng: _trial(place, READERS[trial.case], trial, rng), weight=2)


def _half_run(place: Place, life: Path) -> None:
    """Copy a run that was killed shortly before its end, with two checkpoints."""
    _copy_out(CASES["train"], life, killed(place, "train"))


def _half_sweep(place: Place, life: Path) -> None:
    _copy_out(CASES["sweep"], life, killed(place, "sweep"))


def killed(place: Place, name: str) -> Path:
    """Return the folder of a life that ended by a kill, after about two thirds of its write operations; it is made once."""
    life = place.scratch / "half" / name
    if not life.exists():
        case, reference = CASES[name], place.reference(CASES[name])
        made = life.with_name(f"{name}-made")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        case.prepare(place, made)
        [child] = case.start(place, made, Fault(str(made), "kill", at=max(1, len(reference.operations) * 2 // 3)))
        child.wait(10 * place.patience_s)
        processes.strays(60)
        made.rename(life)
    return life


def _copy_out(case: Case, life: Path, source: Path) -> None:
    shutil.copytree(source / "out", life / "out")


def _with_input(name: str) -> Callable[[Place, Path], None]:
    return CASES[name].prepare


def _ready_cache(place: Place, life: Path) -> None:
    shutil.copytree(place.example("tokenizing") / "out", life / "out")


def _bpe_train(place: Place, life: Path) -> list[Command]:
    flags = (*place.flags("residual", steps=4), f"--config.data.tokenizer=bpe:{life / 'in' / 'bpe.json'}")
    return [Command("train", (*flags, f"--workdir={life / 'out' / 'run'}"))]


def _bpe(place: Place, life: Path) -> None:
    (life / "in").mkdir(exist_ok=True)
    shutil.copy(place.example("tokenizer") / "out" / "bpe.json", life / "in" / "bpe.json")


def _generate(place: Place, life: Path) -> list[Command]:
    return [
        Command(
            "generate", (f"--checkpoint={life / 'in' / 'model'}", "--prompt=stream gate", "--max_new=8", "--seed=1")
        )
    ]


def _model(place: Place, life: Path) -> None:
    shutil.copytree(place.example("convert") / "out" / "model", life / "in" / "model")


def _printed(life: Path) -> dict[str, str]:
    return {"printed": digests.sha((life / "logs" / "0.out").read_bytes())}


TOKENIZER_TRAIN = Case("train with a tokenizer", _bpe_train, lambda life: digests.run(life / "out" / "run"), _bpe)
GENERATE = Case("generate", _generate, _printed, _model)
READERS = {
    "train: its run folder": Reader(CASES["train"], _half_run, "out/run", 3),
    "train: its tokenizer": Reader(TOKENIZER_TRAIN, _bpe, "in"),
    "train: tokenized text": Reader(CASES["tokenizing"], _ready_cache, "out/cache"),
    "sweep: its folder": Reader(CASES["sweep"], _half_sweep, "out/sweep", 2),
    "report: a sweep": Reader(CASES["report"], _with_input("report"), "in/sweep"),
    "record: a sweep": Reader(CASES["record"], _with_input("record"), "in/sweep"),
    "convert: a run": Reader(CASES["convert"], _with_input("convert"), "in/run"),
    "generate: a model folder": Reader(GENERATE, _model, "in"),
}
"""Commands by name, with what is damaged."""


def _trial(place: Place, reader: Reader, trial: Trial, rng: random.Random) -> None:
    reference = place.reference(reader.case)
    folder = fresh(place, trial)
    reader.ready(place, folder)
    paths = [p for p in sorted((folder / reader.below).rglob("*")) if p.is_file() and _is_read(p, reader)]
    kinds = _by_kind(paths, folder / reader.below)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    kind = rng.choice(KINDS)
    trial.count(f"{kind}: {_kind_of(path.relative_to(folder / reader.below))}")
    harm(path, kind, rng, paths)
    logs = {log: log.stat().st_size for log in folder.rglob("*.log") if log.is_file()}
    [child] = reader.case.start(place, folder)
    told = judge(place, trial, [child])
    if told is None:
        return
    if told == 0:
        lines = digests.differing(reference.digest, place.digest(reader.case, folder))
        lines = [line for line in lines if "broken-checkpoint" not in line and not _of_damaged(line, path)]
        if kind == "removed" and path.name == CHECKSUMS:
            # Whoever removes checksums wants the files to be used as they are.
            lines = [line for line in lines if line != f"files: missing [{path.relative_to(folder / 'out')}], more []"]
        if lines:
            _said_so(trial, child.said + _new_lines(folder, logs), lines)
    else:
        trial.verdict = "refused"
    trial.detail = trial.detail or f"{path.relative_to(folder)} {kind}: {child.said.strip()[-300:]}"
    if trial.verdict in ("equal", "refused", "recovered"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_read(path: Path, reader: Reader) -> bool:
    """Return whether a command may read a file: programs are another matter, and a sweep leaves runs alone that have ended."""
    run = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), None)
    ended = run is not None and (run / "summary.json").exists() and reader.case is CASES["sweep"]
    return "/xla/" not in str(path) and not ended


def judge(place: Place, trial: Trial, children: list[Child]) -> int | None:
    """Wait for commands.  Return the largest status, or None if the trial failed: a hang, a traceback, a crash, no sentence."""
    for child in children:
        if child.wait(place.patience_s) is None:
            child.kill()
            child.wait(10)
            trial.fail("hang", f"still there after {place.patience_s} s: {child.said[-1500:]}")
    if left := processes.strays(60):
        trial.fail("stray", left)
    for child in children:
        if "Traceback" in child.said or (child.status not in (None, 0) and not child.said.strip()):
            trial.fail("traceback", f"status {child.status}: {child.said[-2500:]}")
        elif child.status is not None and child.status < 0:
            trial.fail("crash", f"status {child.status}: {child.said[-2500:]}")
    return None if trial.verdict != "equal" else max(child.status or 0 for child in children)


WORDS = ("damaged", "cannot be read", "left out", "doubled", "written anew", "computed again")
"""Words of sentences by which a command says that it has mended something or left it out."""


def _new_lines(folder: Path, before: dict[Path, int]) -> str:
    """Return what the runs of a sweep have said in their logs since these had the sizes `before`."""
    logs = [log for log in sorted(folder.rglob("*.log")) if log.is_file()]
    return "".join(log.read_bytes()[before.get(log, 0) :].decode(errors="replace") for log in logs)


def _said_so(trial: Trial, text: str, lines: list[str]) -> None:
    said = [line for line in text.splitlines() if any(word in line for word in WORDS)]
    if said:
        trial.verdict, trial.detail = "recovered", f"{said[0]} ({'; '.join(lines)})"[:600]
    else:
        trial.fail("silent", f"other results without a word: {'; '.join(lines)}; said: {text[-800:]}")


def _of_damaged(line: str, path: Path) -> bool:
    """Return whether a line of `digests.differing` is about a file that the command neither reads nor writes, such as a log."""
    return path.suffix in (".log", ".pdf", ".svg", ".png") and path.name in line


def _kind_of(path: Path) -> str:
    """Return the kind of a file by its path: names of steps and of Orbax's files are left out."""
    parts = [part for part in path.parts if not part.isdigit()]
    if "checkpoints" in parts:
        inner = parts[parts.index("checkpoints") + 1 :]
        parts = ["checkpoints", *inner[:1], *(["..."] if len(inner) > 2 else []), *inner[-1:]]
    if parts[-1] and (len(parts[-1]) >= 32 or parts[-2:-1] == ["d"]):
        parts[-1] = f"*{Path(parts[-1]).suffix}"
    return "/".join(parts[-3:])


def _by_kind(paths: list[Path], root: Path) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(_kind_of(path.relative_to(root)), []).append(path)
    return kinds


def harm(path: Path, kind: str, rng: random.Random, others: list[Path]) -> None:
    """Damage a file in one of the ways of `KINDS`."""
    content = bytearray(path.read_bytes())
    half = rng.randrange(len(content) + 1)
    if kind == "swapped":
        other = rng.choice(others)
        aside = path.with_name("aside-of-the-campaign")
        os.replace(path, aside)
        shutil.copy(other, path) if other != path else shutil.copy(aside, path)
        if other != path:
            shutil.copy(aside, other)
        aside.unlink()
        return
    if kind in ("removed", "a folder"):
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        return
    if kind == "flipped bit" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[:half]
    elif kind == "empty":
        content.clear()
    elif kind == "torn":
        content[half:] = rng.randbytes(len(content) - half)
    elif kind == "zeros":
        content[half:] = bytes(len(content) - half)
    path.write_bytes(content)
