"""A grid of runs: points, their names and their configurations, and what a sweep's folder says about them.

A sweep file is Python with a docstring and `get_sweep()`:

    def get_sweep():
        points = product(over("connection", ["residual", "mhc:t_max=5"]), over("optimizer.learning_rate", [1e-3, 1e-2]))
        return Sweep(base="../configs/prototype.py", points=product(points, seeds(3)))

The folder of a sweep holds the run folders, `results.csv`, `results.parquet`, `sweep.json` (the runs of the latest grid), `logs/`
(what each process printed) and `.sweep/` (configurations, locks, failures, XLA's compile cache).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fcntl
import itertools
import json
import os
import re
import runpy
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_jax import connections
from mhc_jax.analysis.records import SHORT, flatten, identity
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError, require
from mhc_jax.runs.folder import read_json, write_json

Point = dict[str, Any]
"""Settings of one run: dotted keys of the configuration, and the two short hands `connection` (a spec) and `seed`."""


@dataclass(frozen=True)
class Sweep:
    """What `get_sweep` returns."""

    base: str
    """Config file, with `:arg` if wanted; relative to the sweep file."""
    points: Sequence[Point]
    settings: Point = field(default_factory=dict)
    """Of all runs; they do not show in names."""
    baseline: Point = field(default_factory=dict)
    """What the other points are compared with, such as {"connection": "hc"}; it agrees with each of them in all settings but
    these.  Empty: the residual connection or, without it, the connection of the first point."""


@dataclass(frozen=True)
class Grid:
    """A sweep with its configurations built."""

    title: str
    """First line of the sweep file's docstring."""
    runs: Sequence[Run]
    baseline: Point = field(default_factory=dict)
    """As `Sweep.baseline`."""


@dataclass(frozen=True)
class Run:
    """One run of the grid."""

    name: str
    point: Point
    config: ExperimentConfig


def over(key: str, values: Sequence[Any]) -> list[Point]:
    """One point a value."""
    return [{key: value} for value in values]


def seeds(k: int) -> list[Point]:
    """k points; `seed` sets train.seed and data.seed, so that runs of one seed are paired."""
    return over("seed", range(k))


def product(*axes: Sequence[Point]) -> list[Point]:
    """Every combination, the last axis fastest."""
    return [_merged(parts) for parts in itertools.product(*axes)]


def zip_points(*axes: Sequence[Point]) -> list[Point]:
    """First with first, second with second.

    Raises:
      InputError: the axes have different lengths.
    """
    lengths = [len(axis) for axis in axes]
    require(len(set(lengths)) <= 1, f"zip_points is given axes of {lengths} points; they must have the same length.")
    return [_merged(parts) for parts in zip(*axes, strict=True)]


def _merged(parts: Sequence[Point]) -> Point:
    keys = [key for part in parts for key in part]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"Two axes of the sweep both set {', '.join(twice)}; set it in one.")
    return {key: value for part in parts for key, value in part.items()}


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a sweep file and build every configuration of its grid.

    Args:
      file: the sweep file.
      overrides: `key=value`, for all runs; a key that a point sets is the point's.

    Raises:
      InputError: a file that cannot be used, an unknown key, a refused value, two runs of one name or one configuration, a
        baseline that no run of the grid is.
    """
    file = Path(file)
    found = _run_file(file)
    require(
        "get_sweep" in found, f"The sweep file {str(file)!r} has no get_sweep(); README's section Sweeps shows one."
    )
    require(bool(found["__doc__"]), f"The sweep file {str(file)!r} has no docstring; say its command, result and cost.")
    sweep = _call(file, found["get_sweep"])
    require(isinstance(sweep, Sweep), f"get_sweep of {str(file)!r} must return a Sweep, not a {type(sweep).__name__}.")
    path, _, arg = sweep.base.partition(":")
    config_file = file.parent / path
    config = _run_file(config_file)
    require("get_config" in config, f"The config file {str(config_file)!r} has no get_config().")
    base = _call(config_file, config["get_config"], *([arg] if arg else [])).to_dict()
    title = found["__doc__"].strip().splitlines()[0].rstrip(".")
    runs = plan(base, sweep.points, [sweep.settings, *map(_override, overrides)])
    return Grid(title, runs, canonical_baseline(sweep.baseline, runs))


def canonical_baseline(baseline: Any, runs: Sequence[Run]) -> Point:
    """The baseline as the runs of the grid spell it.

    Raises:
      InputError: no mapping of settings, or no run of the grid has these settings.
    """
    require(
        isinstance(baseline, Mapping) and isinstance(baseline.get("connection", ""), str),
        f"baseline of the sweep is {baseline!r}; give a mapping such as {{'connection': 'hc'}}.",
    )
    known = [identity(to_mapping(run.config)) for run in runs]
    wanted = dict(baseline)
    if "connection" in wanted:
        wanted["connection"] = connections.spec(connections.parse(wanted["connection"]))
    for key in wanted:
        hint = "spell the connection as a spec" if key.startswith("model.connection.") else "give a setting of the runs"
        require(key in known[0], f"baseline of the sweep sets {key!r}, by which runs are not told apart; {hint}.")
    found = [one for one in known if all(one[key] == value for key, value in wanted.items())]
    require(
        bool(found),
        f"No point of the sweep is its baseline {_spelled(dict(baseline))}; give settings that one of the points has.",
    )
    return {key: found[0][key] for key in wanted}


def plan(base: Mapping[str, Any], points: Sequence[Point], overrides: Sequence[Point] = ()) -> list[Run]:
    """Runs of a grid, validated.

    Args:
      base: nested mapping with every leaf of the configuration.
      points: what each run changes.
      overrides: changes of all runs, applied first; they do not show in names.

    Raises:
      InputError: as `load_sweep`.
    """
    require(bool(points), "The sweep has no points; give at least one.")
    runs: dict[str, Run] = {}
    seen: dict[str, Point] = {}
    for point in points:
        mapping = copy.deepcopy(dict(base))
        for change in (*overrides, point):
            _apply(mapping, change)
        try:
            config = from_mapping(mapping)
        except InputError as error:
            raise InputError(f"Point {_spelled(point)}: {error}") from error
        name = run_name(point)
        text = json.dumps(to_mapping(config), sort_keys=True)
        require(
            text not in seen,
            f"Points {_spelled(seen.get(text, {}))} and {_spelled(point)} are the same configuration; leave one out.",
        )
        require(
            name not in runs,
            f"Points {_spelled(runs[name].point) if name in runs else ''} and {_spelled(point)} would share the run "
            f"folder {name!r}; spell one differently.",
        )
        seen[text] = point
        runs[name] = Run(name, point, config)
    return list(runs.values())


def run_name(point: Point) -> str:
    """Folder of a run: made from its own settings alone, so that it stays when other points come and go.

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


def _apply(mapping: dict[str, Any], point: Point) -> None:
    """Write a point into a nested configuration; the connection first, since its settings may be keys of the point."""
    if "connection" in point:
        mapping["model"]["connection"] = to_mapping(connections.parse(point["connection"]))
    for key, value in point.items():
        if key == "seed":
            mapping["train"]["seed"] = mapping["data"]["seed"] = value
        elif key != "connection":
            known = flatten(mapping)
            near = difflib.get_close_matches(key, [*known, "connection", "seed"], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The keys are {', '.join(known)}."
            require(key in known, f"The sweep sets {key!r}, which the configuration does not have. {hint}")
            *path, leaf = key.split(".")
            section = mapping
            for part in path:
                section = section[part]
            section[leaf] = value


def _override(text: str) -> Point:
    """`key=value`, the value as Python spells it, else as text."""
    key, equals, value = text.partition("=")
    require(bool(equals), f"--set is {text!r}; give key=value, such as --set=data.source=texts/*.jsonl.")
    readable = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\[.*\]|true|false", value)
    if value in ("True", "False"):
        return {key: value == "True"}
    if readable and key not in ("connection", "model.experts"):
        number = re.sub(r"^\+", "", value)
        return {key: int(number) if re.fullmatch(r"-?\d+", number) else _number(number)}
    return {key: value}


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return json.loads(text)


def _spelled(point: Point) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in point.items()) + "}"


def _run_file(file: Path) -> dict[str, Any]:
    require(file.is_file(), f"The file {str(file)!r} does not exist; give a Python file.")
    try:
        return runpy.run_path(str(file))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The file {str(file)!r} fails: {type(error).__name__}: {error}") from error


def _call(file: Path, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{function.__name__} of {str(file)!r} fails: {type(error).__name__}: {error}") from error


def select(runs: Sequence[Run], part: str) -> list[Run]:
    """Every `of`-th run from the k-th on, for `part` = 'k/of' with k from 1; all runs for an empty one.

    Raises:
      InputError: not of that form.
    """
    if not part:
        return list(runs)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    k, of = (int(match[1]), int(match[2])) if match else (0, 0)
    require(1 <= k <= of, f"--select is {part!r}; give k/of with k from 1 to of, such as 1/4.")
    return list(runs[k - 1 :: of])


def write_plan(workdir: Path, grid: Grid) -> None:
    """Write what workers and results read: one file a run, and sweep.json.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        for folder in ("runs", "locks", "failed"):
            (workdir / ".sweep" / folder).mkdir(parents=True, exist_ok=True)
        (workdir / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot create {workdir}: {error.strerror}; choose a folder you may write to.") from error
    for run in grid.runs:
        entry = {"name": run.name, "point": run.point, "config": to_mapping(run.config)}
        write_json(workdir / ".sweep" / "runs" / f"{run.name}.json", entry)
    write_json(
        workdir / "sweep.json",
        {"title": grid.title, "baseline": grid.baseline, "runs": [run.name for run in grid.runs]},
    )


def read_plan(workdir: Path) -> dict[str, dict[str, Any]]:
    """Run name to its entry (name, point, config): the latest grid, then earlier runs that were begun.

    Raises:
      InputError: `workdir` is no folder of a sweep.
    """
    require((workdir / "sweep.json").is_file(), f"{str(workdir)!r} is no folder of a sweep: it has no sweep.json.")
    names = list(read_json(workdir / "sweep.json")["runs"])
    others = sorted(path.stem for path in (workdir / ".sweep" / "runs").glob("*.json"))
    names += [name for name in others if name not in names and (workdir / name).is_dir()]
    return {name: read_json(workdir / ".sweep" / "runs" / f"{name}.json") for name in names}


class Busy(Exception):  # noqa: N818  (a state, not a mistake)
    """Another process has the run; the text names it."""


@contextlib.contextmanager
def run_lock(workdir: Path, name: str) -> Iterator[None]:
    """Hold a run while it is trained.

    The lock is the kernel's (flock), so that a dead process holds none, however it died; the file names the last holder.

    Raises:
      Busy: another process holds it.
    """
    path = workdir / ".sweep" / "locks" / name
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Busy(file.read().strip() or "another process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
