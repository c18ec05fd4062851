"""The grid of a sweep: its points, the names and configurations of its runs, and the files that describe it on disk.

A sweep file is a Python file with a docstring and a function `get_sweep`:

    def get_sweep():
        points = product(over("connection", ["residual", "mhc:t_max=5"]), over("optimizer.learning_rate", [1e-3, 1e-2]))
        return Sweep(base="../configs/prototype.py", points=product(points, seeds(3)))

The folder of a sweep holds the run folders, `results.csv`, `results.parquet`, `sweep.json` (the runs of the latest grid), `logs/`
(the output of each process) and `.sweep/` (configurations, failures, XLA's compile cache).
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import json
import operator
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_jax import connections
from mhc_jax.analysis.run_reader import SHORT, flatten, identity
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import LONGEST_NAME, InputError, require, shown
from mhc_jax.files.aside import EXTRA
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.sweeps.bisection import Bisection, lines
from mhc_jax.sweeps.field_types import check_types

ROOM = len(".json") + EXTRA
"""Number of bytes that file names of a run have beside its name, as `.sweep/runs/NAME.json` has while it is written aside."""
Point = dict[str, Any]
"""Settings that one run of a sweep changes, by dotted key of the configuration.

There are two shorthands: `connection` takes a text such as `mhc:t_max=5`, and `seed` sets both train.seed and data.seed.
"""


@dataclass(frozen=True)
class Sweep:
    """The description of a sweep that the function `get_sweep` of a sweep file returns."""

    base: str
    """Path of the config file relative to the folder of the sweep file, followed by `:arg` if the config file takes an argument."""
    points: Sequence[Point]
    settings: Point = field(default_factory=dict)
    """Settings by which all runs of the sweep differ from the config file.  Names of runs do not include them."""
    baseline: Point = field(default_factory=dict)
    """Settings of the baseline, such as {"connection": "hc"}.

    In all other settings a baseline agrees with the variant that is compared with it.  An empty mapping means the residual
    connection or, if no run has it, the connection of the first point.
    """
    bisection: Bisection | None = None
    """The setting whose largest stable value is searched for.  None: every run of the grid is trained."""


@dataclass(frozen=True)
class Grid:
    """The grid of a sweep: the title of the sweep, all runs with their configurations, and the settings of the baseline."""

    title: str
    """First line of the sweep file's docstring."""
    runs: Sequence[Run]
    baseline: Point = field(default_factory=dict)
    """Settings of the baseline, as `canonical_baseline` returns them."""
    bisection: Bisection | None = None


@dataclass(frozen=True)
class Run:
    """One run of a sweep's grid: its name, its point and its configuration."""

    name: str
    point: Point
    config: ExperimentConfig


def over(key: str, values: Sequence[Any]) -> list[Point]:
    """Make one point for each value of the setting `key`."""
    return [{key: value} for value in values]


def seeds(k: int) -> list[Point]:
    """Make k points that set `seed` to 0, ..., k - 1.  Comparisons pair runs of equal seeds."""
    return over("seed", range(k))


def product(*axes: Sequence[Point]) -> list[Point]:
    """Return every combination of one point from each axis, merged into one point.  Points of the last axis vary fastest.

    Raises:
      InputError: two axes set the same setting.
    """
    return [_merged(parts) for parts in itertools.product(*axes)]


def zip_points(*axes: Sequence[Point]) -> list[Point]:
    """Merge the first points of all axes into one point, the second points into another, and so on.

    Raises:
      InputError: the axes have different lengths, or two axes set the same setting.
    """
    lengths = [len(axis) for axis in axes]
    require(len(set(lengths)) <= 1, f"zip_points is given axes of {lengths} points; they must have the same length.")
    return [_merged(parts) for parts in zip(*axes, strict=True)]


def _merged(parts: Sequence[Point]) -> Point:
    keys = [key for part in parts for key in part]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"Two axes of the sweep both set {', '.join(twice)}; set it in one.")
    return {key: value for part in parts for key, value in part.items()}


def load_sweep(file: str | Path, base: Mapping[str, Any] | None = None) -> Grid:
    """Read a sweep file and build every configuration of its grid.

    Args:
      file: the sweep file.
      base: the configuration that the points change.  None means the `base_configuration` of the file.

    Raises:
      InputError: a file cannot be used, a key is unknown, a value is invalid, two runs have the same name or configuration, no
        run of the grid has the settings of the baseline, or a point lacks the setting of the bisection.
    """
    title, sweep = _read_sweep(Path(file))
    runs = plan(base_configuration(file) if base is None else base, sweep.points)
    if sweep.bisection is not None:
        lines(runs, sweep.bisection.key)
    return Grid(title, runs, canonical_baseline(sweep.baseline, runs), sweep.bisection)


def base_configuration(file: str | Path) -> dict[str, Any]:
    """Return the configuration of a sweep's config file, changed by `Sweep.settings`, as a nested mapping.

    Raises:
      InputError: a file cannot be used, or a key is unknown.
    """
    _, sweep = _read_sweep(Path(file))
    config_file, *arg = sweep.base.split(":", 1)
    config, _ = call_in_file(Path(file).parent / config_file, "get_config", *arg)
    require(
        hasattr(config, "to_dict"),
        f"get_config of {config_file!r} returned a {type(config).__name__}; it must return a ConfigDict.",
    )
    return applied(config.to_dict(), sweep.settings)


def _read_sweep(file: Path) -> tuple[str, Sweep]:
    """Return the title of a sweep file, and the sweep that its `get_sweep` returns."""
    sweep, docstring = call_in_file(file, "get_sweep")
    require(bool(docstring), f"The sweep file {str(file)!r} has no docstring; say its command, result and cost.")
    require(isinstance(sweep, Sweep), f"get_sweep of {str(file)!r} must return a Sweep, not a {type(sweep).__name__}.")
    check_types(sweep)
    return docstring.strip().splitlines()[0].rstrip("."), sweep


def call_in_file(file: Path, function: str, *args: str) -> tuple[Any, str]:
    """Run a Python file and call the named function of it.  Return the function's result and the file's docstring.

    Raises:
      InputError: there is no such file, it has no such function, or either fails.
    """
    require(file.is_file(), f"The file {str(file)!r} does not exist; give a Python file.")
    try:
        names = runpy.run_path(str(file))
        require(function in names, f"The file {str(file)!r} has no {function}(); the files in experiments/ show one.")
        return names[function](*args), names["__doc__"] or ""
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"The file {str(file)!r} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def canonical_baseline(baseline: Any, runs: Sequence[Run]) -> Point:
    """Return the settings of a sweep's baseline with the values that runs have: `mhc:t_max=5` becomes `mhc:init=paper:t_max=5`.

    Raises:
      InputError: `baseline` is not a mapping of settings, or no run of the grid has these settings.
    """
    require(
        isinstance(baseline, Mapping)
        and isinstance(baseline.get("connection", ""), str)
        and all(isinstance(key, str) for key in baseline),
        f"baseline of the sweep is {shown(baseline)}; give a mapping such as {{'connection': 'hc'}}.",
    )
    identities = [identity(to_mapping(run.config)) for run in runs]
    wanted = dict(baseline)
    if "connection" in wanted:
        wanted["connection"] = connections.spec(connections.parse(wanted["connection"]))
    for key in wanted:
        hint = "spell the connection as a spec" if key.startswith("model.connection.") else "give a setting of the runs"
        require(key in identities[0], f"baseline of the sweep sets {key!r}, by which runs are not told apart; {hint}.")
    matches = [known for known in identities if all(known[key] == value for key, value in wanted.items())]
    require(
        bool(matches),
        f"No point of the sweep is its baseline {_spelled(baseline)}; give settings that one of the points has.",
    )
    return {key: matches[0][key] for key in wanted}


def plan(base: Mapping[str, Any], points: Sequence[Point]) -> list[Run]:
    """Make a run from each point: its name and its configuration.

    Args:
      base: the configuration that the points change, as a nested mapping with every setting.
      points: settings that each run changes.

    Raises:
      InputError: there are no points, a key is unknown, a value is invalid, or two points have the same name or configuration.
    """
    require(bool(points), "The sweep has no points; give at least one.")
    runs: dict[str, Run] = {}
    points_of: dict[str, Point] = {}
    for point in points:
        try:
            config = from_mapping(applied(base, point))
        except InputError as error:
            raise InputError(f"Point {_spelled(point)}: {error}") from error
        name, text = run_name(point), json.dumps(to_mapping(config), sort_keys=True)
        require(
            len(os.fsencode(name)) <= LONGEST_NAME - ROOM,
            f"Point {_spelled(point)}: the run folder would be named {shown(name)}, which has {len(os.fsencode(name))} bytes; at "
            f"most {LONGEST_NAME - ROOM} are possible: put what all points share into settings, or shorten the values.",
        )
        if text in points_of:
            both = f"{_spelled(points_of[text])} and {_spelled(point)}"
            raise InputError(f"Points {both} are the same configuration; leave one out.")
        if name in runs:
            both = f"{_spelled(runs[name].point)} and {_spelled(point)}"
            raise InputError(f"Points {both} would share the run folder {name!r}; spell one differently.")
        points_of[text] = point
        runs[name] = Run(name, point, config)
    return list(runs.values())


def run_name(point: Point) -> str:
    """Return the name of a run's folder.  It depends on the run's point alone, not on other points of the sweep.

    >>> run_name({"optimizer.learning_rate": 0.01, "seed": 2, "connection": "mhc:t_max=5"})
    'mhc-t_max-5-lr0.01-seed2'
    """
    parts = [str(point["connection"])] if "connection" in point else []
    for key in sorted(set(point) - {"connection", "seed"}):
        value = point[key]
        text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        parts.append(f"{SHORT.get(key, key.rpartition('.')[2])}{text}")
    parts += [f"seed{point['seed']}"] if "seed" in point else []
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts)).strip("-.") or "base"


def applied(base: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Return a copy of a nested configuration, changed by the settings of a point.

    `connection` is set first, because other keys of the point may be settings of this connection.

    Raises:
      InputError: the configuration lacks a key of the point, or the text of the connection is invalid.
    """
    out = copy.deepcopy(dict(base))
    if "connection" in point:
        connection = point["connection"]
        require(
            isinstance(connection, str), f"connection is {shown(connection)}; it must be a text such as 'mhc:t_max=5'."
        )
        out["model"]["connection"] = to_mapping(connections.parse(point["connection"]))
    if "seed" in point:
        out["train"]["seed"] = out["data"]["seed"] = point["seed"]
    known = flatten(out)
    for key, value in point.items():
        if key in ("connection", "seed"):
            continue
        if key not in known:
            near = difflib.get_close_matches(key, [*known, "connection", "seed"], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(known)}."
            raise InputError(f"The sweep sets {key!r}, which the configuration does not have. {hint}")
        *path, leaf = key.split(".")
        section = functools.reduce(operator.getitem, path, out)
        # An int for a float setting becomes a float, because the flag --config.KEY=VALUE accepts only the type of the value here.
        fits = isinstance(section[leaf], float) and type(value) is int and abs(value) < 1e308
        section[leaf] = float(value) if fits else value
    return out


def _spelled(point: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{_plain(key)}: {_plain(value)}" for key, value in point.items()) + "}"


def _plain(value: object) -> str:
    """Return a short text as it is, and any other value as `shown` does."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else shown(value)


def select(runs: Sequence[Run], part: str) -> list[Run]:
    """Return the runs that the text `part`, 'k/of', selects: the k-th run, counted from 1, and every `of`-th run after it.

    An empty `part` selects all runs.

    Raises:
      InputError: `part` is neither empty nor 'k/of' with 1 <= k <= of.
    """
    if not part:
        return list(runs)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    k, of = (int(match[1]), int(match[2])) if match else (0, 0)
    require(1 <= k <= of, f"--select is {part!r}; give k/of with k from 1 to of, such as 1/4.")
    return list(runs[k - 1 :: of])


def write_plan(workdir: Path, grid: Grid) -> None:
    """Write the plan of a sweep into its folder: sweep.json with the names of the runs, and the configuration of every run.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        for folder in ("runs", "failed"):
            (workdir / ".sweep" / folder).mkdir(parents=True, exist_ok=True)
        (workdir / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot create {workdir}: {error.strerror}; choose a folder you may write to.") from error
    for run in grid.runs:
        write_json(_planned(workdir, run.name), to_mapping(run.config))
    names = [run.name for run in grid.runs]
    search = grid.bisection and {"key": grid.bisection.key, "loss_below": grid.bisection.loss_below, "over": False}
    plan = {"title": grid.title, "baseline": grid.baseline, "bisection": search, "runs": names}
    write_json(workdir / "sweep.json", plan)


def read_plan(workdir: Path) -> dict[str, dict[str, Any]]:
    """Return the configuration of each run by its name, as a nested mapping.

    The runs of the latest grid come first, and after them the runs of earlier grids that have begun.

    Raises:
      InputError: `workdir` is not the folder of a sweep.
    """
    names = list(read_sweep_json(workdir)["runs"])
    earlier = sorted(path.stem for path in _planned(workdir, "any").parent.glob("*.json"))
    names += [name for name in earlier if name not in names and (workdir / name).is_dir()]
    return {name: read_json(_planned(workdir, name)) for name in names}


def read_sweep_json(workdir: Path) -> dict[str, Any]:
    """Return the content of a sweep's sweep.json: its `title`, `baseline`, `bisection`, and the names of its `runs`.

    Raises:
      InputError: there is no such file, or it lacks one of these entries.
    """
    file = workdir / "sweep.json"
    require(file.is_file(), f"{str(workdir)!r} is no folder of a sweep: it has no sweep.json.")
    found = read_json(file)
    names = found.get("runs")
    whole = (
        isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(found.get("title"), str)
    )
    require(
        whole and isinstance(found.get("baseline"), dict),
        f"{file} must hold a title, a baseline and a list of runs; the command of the sweep writes it again.",
    )
    return found


def read_planned(workdir: Path, name: str) -> ExperimentConfig:
    """Return the configuration of the run `name` that `write_plan` wrote in the folder of a sweep."""
    return from_mapping(read_json(_planned(workdir, name)))


def _planned(workdir: Path, name: str) -> Path:
    return workdir / ".sweep" / "runs" / f"{name}.json"
