"""The page of the board, BOARD.md: all entries of each track, and the line of records.

An entry's record is the folder <date>-board-NAME.  It holds what the record of a sweep holds (`reports.record`), and board.json:

    name, given, author   name of the entry, the connection or config file that was given, and who entered it (may be empty)
    timing                r, step_s and residual_step_s (seconds, medians), rounds, cores, device, jax, commit and date
    steps                 number of steps in each track
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.analysis.comparison import DASH, Cell
from mhc_jax.analysis.run_reader import RunRecord, flatten
from mhc_jax.analysis.statistics import SPREAD, Paired, paired, t_interval
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import read_json
from mhc_jax.reports import board_rules as rules
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.record import read_record

MOST_P = 0.01
"""A new best needs a p-value below this, in the one-sided paired t test against the best before."""
PAGE = "BOARD.md"
TEXT = """
# The board

One task, open to every connection, model, optimizer and schedule. The text is Shakespeare's plays, which the package holds, as
bytes (`data.source={source}`). A step reads {batch} sequences of {length} tokens. The task's own entry is the residual model of
`{file}`: width {width}, {blocks} blocks, {steps} steps. What counts is the validation loss after the last step, in nats/token,
over {batches} held-out batches.

`python experiments/board.py` writes this page from the records `*-board-*` beside it.

## Rules

- All settings `data.*`, `train.validation_batches` and the start from random parameters are those of `{file}`.
- There are at least {seeds} seeds: `train.seed` = `data.seed` = 0, 1, 2 and so on. Entries are compared seed by seed.
- A model has at most {parameters} parameters, embeddings and connections included.
- Equal tokens: steps x {batch} x {length} is at most {tokens}.
- Equal wall clock on two cores: there are at most {steps} / r steps, rounded down. Here r is the entry's median step time over
  residual's. Both steps are timed in turns by the command that enters the entry, and the record keeps the times. Compilation
  and validation do not count.
- Everything else is free. An entry that breaks a rule is refused before anything is trained.

## How to enter

One configuration, one command, one pull request:

    python experiments/board.py enter mhc:init=home --name=mhc-init-home
    python experiments/board.py enter my_config.py --name=my-idea --author='A. Name'

The first argument is a connection for the task's model, or a config file with `get_config`. The command times the step, trains
all seeds of both tracks, writes the record and rebuilds this page. It needs a process that may use exactly two CPU cores
(`JAX_PLATFORMS=cpu taskset -c 0,1 python ...` on a larger machine), and a machine without other work until it says that all steps
are timed. A call that was stopped goes on with the same command. An entry that has a record is skipped, so that another name
repeats it. If a timing was disturbed, the whole record may be replaced by a new one, and the log says so. The pull request
holds the record, this page, and the code that the entry needs.

## How an entry becomes the best

The line of records begins with residual. The other entries follow by date and, within a day, by name, which decides what they are
compared with. An entry becomes the best only if a one-sided paired t test against the best before it gives p < {p}, over at least
{seeds} seeds that both have. Any other entry stays in the table; a sentence below names those whose mean loss is lower than the
best's. The p-values are not corrected for the number of entries tried. `python experiments/board.py best NAME` says whether NAME
became the best of a track, and ends with status 1 if it became the best of none.
"""
GPU = "## One GPU\n\nThis track is open and has no entries. Its rules follow with the first run on a GPU."
NOTE = """
The mean loss and its 95 % interval (Student) are over seeds. The difference is the mean of loss minus residual's of the same
seed, with its 95 % interval and the two-sided p of the paired t test. An entry with a run that did not finish has no mean.
Intervals and p do not include the error of r: two timings of one entry have differed by up to 11 %. Where entries of similar r
were timed on different machines, their order may be this error alone. The record of an entry has the times of both steps.
"""


@dataclass(frozen=True)
class Entry:
    """An entry of the board, as its record says it."""

    name: str
    date: str
    """Day (UTC) on which the last run began, such as 2026-11-29."""
    author: str
    timing: Mapping[str, Any]
    steps: Mapping[str, int]
    """Number of steps by track."""
    runs: Sequence[RunRecord]

    def of_track(self, track: str) -> list[RunRecord]:
        """Return the runs of a track.  If both tracks have as many steps, they share their runs."""
        return [run for run in self.runs if run.config["train"]["steps"] == self.steps[track]]

    def losses(self, track: str) -> dict[tuple[int, int], float]:
        """Return the validation losses (nats/token) of a track by seed.  Seeds whose run did not finish are left out."""
        return {
            run.seed: float(run.result("validation_loss"))
            for run in self.of_track(track)
            if run.status == "finished" and run.result("validation_loss") is not None
        }

    def lost(self, track: str) -> int:
        """Return the number of runs of a track that did not finish."""
        return len(self.of_track(track)) - len(self.losses(track))


def read_entries(records: Path, task: ExperimentConfig) -> list[Entry]:
    """Read the records of all entries, by date and then by name.

    Raises:
      InputError: a record is broken or breaks a rule, two records have one name, or entries were trained on different texts.
    """
    entries = [_read(folder, task) for folder in sorted(records.glob("????-??-??-board-*"))]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"There are several records of {', '.join(twice)}; remove all but one of each.")
    rules.same_text({f"{entry.name} (run {run.name})": _text(run) for entry in entries for run in entry.runs})
    return sorted(entries, key=lambda entry: (entry.date, entry.name))


def _text(run: RunRecord) -> str:
    """Return the SHA-256 of both splits of the text that a run read."""
    return " ".join(str(run.env["data"][f"{split}_sha256"]) for split in ("train", "validation"))


def _read(folder: Path, task: ExperimentConfig) -> Entry:
    board, runs = read_json(folder / "board.json"), read_record(folder)
    name = board["name"]
    require(folder.name[11:] == f"board-{name}", f"{folder} is the record of {name!r}; rename the folder.")
    parts = [{"config": run.config, "env": run.env, "summary": run.summary} for run in runs]
    rules.check_record(name, board, parts, task)
    return Entry(name, folder.name[:10], board["author"], board["timing"], board["steps"], runs)


# -- the line of records


@dataclass(frozen=True)
class Challenge:
    """An entry beside the best entry that there was before it, in one track."""

    entry: Entry
    best: Entry | None
    """None for residual, with which the line begins."""
    result: Paired | None
    """Differences of losses, entry minus best, over the seeds of both.  None if there are none."""
    lost: int
    """Number of runs of the entry that did not finish."""

    @property
    def accepted(self) -> bool:
        """Whether the entry became the best: all its runs finished, and p is below `MOST_P` over at least five seeds."""
        if self.best is None:
            return True
        result = self.result
        if result is None or result.p_lower is None or result.seeds < rules.LEAST_SEEDS or self.lost:
            return False
        return result.p_lower < MOST_P

    def sentence(self, track: str) -> str:
        """Return a sentence that says whether the entry became the best of the track, and why."""
        name, title = self.entry.name, rules.TRACKS[track]
        if self.best is None:
            return f"{title}: {name} is the first of the line of records."
        if self.lost:
            return f"{title}: {name} is not the best, since {self.lost} of its runs did not finish."
        if self.result is None or self.result.seeds < rules.LEAST_SEEDS:
            seeds = self.result.seeds if self.result else 0
            return f"{title}: {name} is not the best, since it shares {seeds} seeds with {self.best.name}."
        if self.result.p_lower is None:
            return f"{title}: {name} is not the best, since all its losses differ from {self.best.name}'s by the same number."
        size = f"{self.result.mean:+.4f} nats/token, one-sided p = {self.result.p_lower:.3g} over {self.result.seeds} seeds"
        if self.accepted:
            return f"{title}: {name} became the best; its loss minus {self.best.name}'s is {size}."
        return (
            f"{title}: {name} is not the best, since a new best needs p < {MOST_P:g}; its loss minus {self.best.name}'s is "
            f"{size}."
        )


def challenges(entries: Sequence[Entry], track: str) -> list[Challenge]:
    """Walk through the entries by date and name, and compare each with the best before it.  Residual comes first.

    The result is empty if residual has not been entered.
    """
    first = [entry for entry in entries if entry.name == rules.BASELINE]
    out = [Challenge(entry, None, None, entry.lost(track)) for entry in first]
    for entry in entries if first else []:
        if entry.name != rules.BASELINE:
            best = [challenge.entry for challenge in out if challenge.accepted][-1]
            result = paired(entry.losses(track), best.losses(track))
            out.append(Challenge(entry, best, result, entry.lost(track)))
    return out


def challenge_of(entries: Sequence[Entry], name: str, track: str) -> Challenge:
    """Return the comparison of the entry `name` with the best before it.

    Raises:
      InputError: there is no such entry, or residual has not been entered.
    """
    found = [challenge for challenge in challenges(entries, track) if challenge.entry.name == name]
    if not found:
        raise InputError(
            f"There is no entry {name!r} to compare with {rules.BASELINE}; the entries are "
            f"{', '.join(entry.name for entry in entries) or 'none'}."
        )
    return found[0]


# -- the page


def write_page(records: Path, task: ExperimentConfig) -> Path:
    """Write `records`/BOARD.md from the records of all entries.  The same records give the same bytes.

    Raises:
      InputError: `read_entries` raises it.
    """
    path = records / PAGE
    path.write_text(page(read_entries(records, task), task))
    return path


def page(entries: Sequence[Entry], task: ExperimentConfig) -> str:
    """Return the text of BOARD.md."""
    data, steps = task.data, task.train.steps
    text = TEXT.format(
        source=data.source,
        batch=data.batch_size,
        length=data.sequence_length,
        file=rules.TASK_FILE,
        width=task.model.width,
        blocks=task.model.num_layers,
        steps=steps,
        batches=task.train.validation_batches,
        seeds=rules.LEAST_SEEDS,
        parameters=f"{rules.MOST_PARAMETERS:,}",
        tokens=f"{steps * data.batch_size * data.sequence_length:,}",
        p=f"{MOST_P:g}",
    )
    parts = [text.strip()]
    for track, title in rules.TRACKS.items():
        parts += [f"## {title}", *_track(entries, track, task)]
    return "\n\n".join([*parts, GPU]) + "\n"


def _track(entries: Sequence[Entry], track: str, task: ExperimentConfig) -> list[str]:
    if not entries:
        return ["There are no entries yet."]
    residual = next((entry for entry in entries if entry.name == rules.BASELINE), None)
    order = sorted(entries, key=lambda entry: (*_mean(entry, track), entry.name))
    table = markdown_table([_row(entry, residual, track, task) for entry in order])
    tried = challenges(entries, track)
    line = [challenge for challenge in tried if challenge.accepted]
    if not line:
        return [table, NOTE.strip(), "The line of records begins with residual, which has not been entered yet."]
    records = ["Line of records:", markdown_table([_line(challenge, track) for challenge in line])]
    best = _mean(line[-1].entry, track)
    # An entry may have a lower mean than the best and not be told from it.
    lower = [c.sentence(track) for c in tried if not c.accepted and _mean(c.entry, track) < best]
    return [table, NOTE.strip(), *records, *lower]


def _mean(entry: Entry, track: str) -> tuple[bool, float]:
    losses = list(entry.losses(track).values())
    lost = bool(entry.lost(track)) or not losses
    return lost, math.inf if lost else float(np.mean(losses))


def _row(entry: Entry, residual: Entry | None, track: str, task: ExperimentConfig) -> dict[str, Cell]:
    losses, (lost, mean) = np.asarray(list(entry.losses(track).values())), _mean(entry, track)
    interval = t_interval(losses) if not lost and np.ptp(losses) > SPREAD else None
    result = None
    if residual and residual is not entry and not lost and not residual.lost(track):
        result = paired(entry.losses(track), residual.losses(track))
    total = len(entry.of_track(track))
    texts = {
        "entry": entry.name,
        "connection and changed settings": changes(entry.runs[0], task),
        "mean loss": DASH if lost else f"{mean:.4f}",
        "its interval": _interval(interval, "{:.4f} to {:.4f}"),
        "seeds": f"{len(losses)} of {total}" if lost else f"{total}",
        "parameters": f"{entry.runs[0].result('parameters'):,}",
        "steps": str(entry.steps[track]),
        "r": f"{entry.timing['r']:.3f}",
        "difference": DASH if result is None else f"{result.mean:+.4f}",
        "interval of the difference": _interval(result and result.t_interval, "{:+.4f} to {:+.4f}"),
        "p": DASH if result is None or result.p_t is None else f"{result.p_t:.3g}",
    }
    return {heading: Cell(text, text) for heading, text in texts.items()}


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return DASH if interval is None else form.format(*interval)


def _line(challenge: Challenge, track: str) -> dict[str, Cell]:
    result, entry = challenge.result, challenge.entry
    lost, mean = _mean(entry, track)
    texts = {
        "date": entry.date,
        "entry": entry.name + (f" ({entry.author})" if entry.author else ""),
        "connection": entry.runs[0].connection,
        "mean loss": DASH if lost else f"{mean:.4f}",
        "best before": challenge.best.name if challenge.best else DASH,
        "difference from it": f"{result.mean:+.4f}" if result else DASH,
        "p (one-sided)": f"{result.p_lower:.3g}" if result and result.p_lower is not None else DASH,
    }
    return {heading: Cell(text, text) for heading, text in texts.items()}


def changes(run: RunRecord, task: ExperimentConfig) -> str:
    """Return the connection of an entry, and the other settings by which it differs from the task's configuration.

    Seeds, the number of steps and settings that change no number are left out.
    """
    ours, skipped = flatten(to_mapping(task)), (*rules.FREE, *rules.UNMEASURED)
    words = [
        f"{key}={_word(value)}"
        for key, value in flatten(run.config).items()
        if key in ours and not key.startswith("model.connection.") and key not in skipped and value != ours[key]
    ]
    return " ".join([run.connection, *words])


def _word(value: Any) -> str:
    return re.sub(r"\s+", " ", "+".join(map(str, value)) if isinstance(value, list) else str(value))
