"""Enter configurations into the board: check the rules, time the step, train the seeds of both tracks, and write the record.

The folder of an entry in the working folder is that of a sweep (`sweeps.grid`) with entry.json beside its runs: the configuration,
and the times of the step, so that a call that was stopped goes on with the same number of steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import require
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.loop import EXIT_CODES
from mhc_jax.reports import board_rules as rules
from mhc_jax.reports.record import read_record, without_paths, write_record
from mhc_jax.runs.cpu_variables import cpu_alone
from mhc_jax.runs.environment import environment
from mhc_jax.runs.folder import differences
from mhc_jax.sweeps.grid import Grid, over, plan, product, seeds
from mhc_jax.sweeps.results import result_rows
from mhc_jax.sweeps.runner import cores, run_local

Measure = Callable[[ExperimentConfig, ExperimentConfig], tuple[float, float]]
"""Function that times the train steps of two configurations in turns, and returns the seconds of each."""


@dataclass(frozen=True)
class Candidate:
    """A configuration that is to be entered."""

    name: str
    given: str
    """The connection or the config file that was given."""
    config: ExperimentConfig


@dataclass(frozen=True)
class Setup:
    """What all candidates of a call share."""

    task: ExperimentConfig
    """Configuration of the residual model of the task."""
    workdir: Path
    """Folder of the runs: an entry has the folder `workdir`/NAME."""
    records: Path
    """Folder of the records."""
    seeds: int
    workers: int
    """Number of runs that are trained at the same time."""
    rounds: int
    """Number of rounds in which the step is timed."""
    measure: Measure
    author: str = ""


def enter(candidates: Sequence[Candidate], setup: Setup) -> int:
    """Time the steps of all candidates, then train and record one after another.  Those that have a record already are skipped.

    Returns:
      Exit status: 0 if all of them have a record now, 1 if runs failed, 130 if a signal stopped the call.

    Raises:
      InputError: a candidate breaks a rule, its name is taken by another configuration, or this process does not have the two
        cores that a step is timed on.  Then nothing has been timed or trained.
    """
    names = [candidate.name for candidate in candidates]
    require(len(set(names)) == len(names), f"The names {', '.join(names)} are not distinct; enter each once.")
    for candidate in candidates:
        rules.check_entry(candidate.name, candidate.config, setup.task, setup.seeds)
    todo = [candidate for candidate in candidates if not _is_entered(candidate, setup)]
    require(
        not todo or (cores() == rules.CORES and cpu_alone()),
        f"Steps of the board are timed on {rules.CORES} CPU cores, and this process may use {cores()} and perhaps an accelerator; "
        f"start the command as `JAX_PLATFORMS=cpu taskset -c 0,1 python ...`.",
    )
    timings = [_timing(candidate, setup) for candidate in todo]
    if todo:
        print("all steps are timed", flush=True)
    worst = 0
    for candidate, timing in zip(todo, timings, strict=True):
        status = _enter(candidate, timing, setup)
        if status == EXIT_CODES["interrupted"]:
            return status
        worst = max(worst, status)
    return worst


def _is_entered(candidate: Candidate, setup: Setup) -> bool:
    """Return whether the record of the candidate exists.  A record of another configuration with its name is an `InputError`."""
    found = sorted(setup.records.glob(f"????-??-??-board-{candidate.name}"))
    if not found:
        return False
    recorded, steps = read_record(found[0])[0].config, read_json(found[0] / "board.json")["steps"]
    changed = _changed({**recorded, "train": {**recorded["train"], "steps": steps["tokens"]}}, candidate.config)
    require(
        not changed,
        f"{found[0].name} is the record of another configuration ({'; '.join(changed[:6])}); choose another --name.",
    )
    print(f"{candidate.name} is entered already: {found[0]}")
    return True


def _changed(old: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    """Return lines that say in which settings two configurations differ, seeds and folders of files apart."""
    lines = differences(without_paths(dict(old)), without_paths(to_mapping(config)))
    return [line for line in lines if not line.startswith(("train.seed:", "data.seed:"))]


def _enter(candidate: Candidate, timing: Mapping[str, Any], setup: Setup) -> int:
    name, workdir = candidate.name, setup.workdir / candidate.name
    steps = {"tokens": candidate.config.train.steps, "clock": rules.clock_steps(timing["r"], setup.task)}
    points = product(over("train.steps", sorted(set(steps.values()))), seeds(setup.seeds))
    grid = Grid(f"Entry {name} of the board", plan(to_mapping(candidate.config), points))
    print(
        f"{name}: r = {timing['r']}, {steps['tokens']} steps with equal tokens, {steps['clock']} with equal wall clock"
    )
    if status := run_local(workdir, grid, grid.runs, setup.workers):
        return status
    date = max(row["date"] for row in result_rows(workdir))[:10]
    note = (
        f"A step takes {timing['r']} times residual's (medians of {timing['rounds']} rounds in turns on {timing['cores']} cores). "
        f"Equal tokens: {steps['tokens']} steps; equal wall clock: {steps['clock']} steps."
    )
    temporary = setup.records / f".{name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed here
    write_record(workdir, temporary, note=note)
    board = {"name": name, "given": candidate.given, "author": setup.author, "timing": timing, "steps": steps}
    write_json(temporary / "board.json", board)
    place = setup.records / f"{date}-board-{name}"
    temporary.rename(place)
    print(f"Record: {place}")
    return 0


def _timing(candidate: Candidate, setup: Setup) -> dict[str, Any]:
    """Return the entry `timing` of board.json: that of an earlier call with the same configuration, or else a new measurement."""
    file = setup.workdir / candidate.name / "entry.json"
    if file.is_file():
        earlier = read_json(file)
        changed = _changed(earlier["config"], candidate.config)
        require(
            not changed,
            f"{file.parent} was begun with another configuration ({'; '.join(changed[:6])}); choose another --workdir or --name.",
        )
        return earlier["timing"]
    print(f"{candidate.name}: its step is timed", flush=True)
    if candidate.name == rules.BASELINE:
        config = rules.with_vocabulary(setup.task)
        step_s, residual_step_s = setup.measure(config, config)
        r = 1.0
    else:
        both = rules.with_vocabulary(candidate.config), rules.with_vocabulary(setup.task)
        step_s, residual_step_s = setup.measure(*both)
        r = rules.step_ratio(step_s, residual_step_s)
    env = environment()
    timing = {"r": r, "step_s": step_s, "residual_step_s": residual_step_s, "rounds": setup.rounds, "cores": cores()}
    timing |= {"device": env["device"], "jax": env["packages"]["jax"], "commit": env["commit"], "date": env["date"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"config": to_mapping(candidate.config), "timing": timing})
    return read_json(file)["timing"]
