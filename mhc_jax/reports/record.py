"""Write and read the record of a sweep: the small part of the sweep's folder that the repository keeps.

A record holds README.md, results.csv, runs.json and, if wanted, metrics/NAME.jsonl: the metrics.jsonl of the run NAME.
Checkpoints, locks and logs are not copied.  In the files, absolute paths are cut to their last part.  runs.json is one object:

    config   the settings that all runs share, nested as in config.json
    env      the entries of env.json that all runs share
    runs     an object for each run, on a line of its own and in the order of names: its `name`, by dotted key the settings that
             are not shared (`config`), the other entries of its env.json (`env`), and its summary.json (`summary`)
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhc_jax.analysis.comparison import STATISTICS, findings, statistics_rows
from mhc_jax.analysis.grouping import ENDED, Variant, group
from mhc_jax.analysis.run_reader import RunRecord, flatten, read_run, run_of
from mhc_jax.errors import InputError, require
from mhc_jax.files.aside import aside
from mhc_jax.files.json_files import read_json
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.page import changed_settings
from mhc_jax.sweeps.results import result_rows, write_csv

MISSING = ("pending", "begun", "interrupted")
"""Values of `run_status` for runs that have not ended and may still finish."""
SEARCHED = (
    "A search by bisection chose these runs, so that a value of the setting may have been tried with some seeds only. Nothing is "
    "compared here; results.csv has every run."
)
"""Text in place of findings and table in the record of a search."""
_ENV_KEYS = ("date", "commit", "dirty", "device", "device_count", "packages", "python", "command")
FOLDERS = re.compile(r"(?<![\w.*/])/(?:[^\s/'\"=,:]+/)+")
"""Pattern that matches the folders of an absolute path, but not the folders of a URL or a relative path."""


def shortened(text: str) -> str:
    """Return `text` with each absolute path cut to its last part.

    >>> shortened("train.py --data=/home/me/texts/*.txt texts/a.txt model.py:/home/me/b.py")
    'train.py --data=*.txt texts/a.txt model.py:b.py'
    """
    return FOLDERS.sub("", text)


def write_record(
    sweep_folder: Path, folder: Path, metrics: bool = False, unfinished: bool = False, note: str = ""
) -> Path:
    """Write the record of a sweep.  The folder of the sweep does not change.

    The record gets its name when it is whole, so that a kill leaves none, and the same command writes it.

    Args:
      sweep_folder: the folder that `experiments/sweep.py` wrote.
      folder: folder of the record, which must not exist.
      metrics: whether to copy metrics.jsonl, too.
      unfinished: whether to accept a sweep with runs that have not ended.  The record leaves these runs out, and README.md
        counts them.
      note: a sentence to add to README.md, or empty.

    Returns:
      The folder of the record.

    Raises:
      InputError: `sweep_folder` holds no sweep, runs have not ended and `unfinished` is false, no run has ended, or `folder`
        exists.
    """
    rows = result_rows(sweep_folder)
    missing = [row["run"] for row in rows if row["status"] in MISSING]
    ended = [row["run"] for row in rows if row["status"] in ENDED]
    require(
        unfinished or not missing,
        f"{len(missing)} of {len(rows)} runs of {sweep_folder} have not ended ({', '.join(missing[:3])}); run the sweep's "
        f"command again, or record it as it is with --unfinished.",
    )
    require(bool(ended), f"No run of {sweep_folder} has ended; there is nothing to record.")
    sweep = read_json(sweep_folder / "sweep.json")
    search = sweep.get("bisection")
    require(
        unfinished or not search or search["over"],
        f"The search for the largest stable {search and search['key']} in {sweep_folder} is not over; run the sweep's command "
        "again, or record it as it is with --unfinished.",
    )
    require(not folder.exists(), f"The record {folder} is there already; remove it to write it anew.")
    records = [read_run(sweep_folder / name) for name in ended]
    text = _page(sweep, records, [row["status"] for row in rows], note)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with aside(folder.parent, folder.name) as whole:
            write_runs([sweep_folder / name for name in ended], whole, metrics)
            write_csv([without_paths(row) for row in rows], whole)
            (whole / "README.md").write_text(shortened(text))
            whole.rename(folder)
    except OSError as error:
        raise InputError(f"The record {folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _compared(variants: Sequence[Variant]) -> list[str]:
    """Return the findings and the table of variants."""
    found = [f"- {sentence}" for sentence in findings(variants)]
    return [*found, "", markdown_table(statistics_rows(variants)), "", STATISTICS]


def _page(sweep: Mapping[str, Any], records: Sequence[RunRecord], states: Sequence[str], note: str) -> str:
    """Return the text of a record's README.md.

    It holds the command, commits, devices and dates of the runs, how they ended, the findings, and the table of variants.  A search
    by bisection trains other seeds at each value, so that its page has no findings and no table.

    Args:
      sweep: content of sweep.json.
      records: the runs that ended.
      states: `run_status` of each run of the sweep.
      note: a sentence to add to the text, or empty.

    Raises:
      InputError: env.json of a run lacks an entry.
    """
    for record in records:
        missing = [key for key in _ENV_KEYS if key not in record.env]
        require(
            not missing,
            f"{record.folder / 'env.json'} has no {', '.join(missing)}; restore the file, or remove the run's folder and run the "
            "sweep's command again.",
        )
    envs = [record.env for record in records]
    dates = sorted(str(env["date"]) for env in envs)
    commits = {str(env["commit"])[:7] + " (changed files)" * bool(env["dirty"]) for env in envs}
    devices = {f"{env['device_count']} x {env['device']}" for env in envs}
    versions = {f"jax {env['packages']['jax']}, Python {env['python']}" for env in envs}
    made = "; ".join(", ".join(sorted(values)) for values in (commits, devices, versions))
    counts = ", ".join(f"{list(states).count(state)} {state}" for state in dict.fromkeys(states))
    lines = [
        f"# {sweep['title']}",
        "",
        *(f"    {command}" for command in dict.fromkeys(str(env["command"]) for env in envs)),
        "",
        f"Commit {made}; begun {dates[0]}, last run {dates[-1]}. {len(states)} runs: {counts}.",
        changed_settings(records),
        *([note] if note else []),
        "",
        *(_compared(group(records, sweep["baseline"] or None)) if not sweep.get("bisection") else [SEARCHED]),
        "",
    ]
    return "\n".join(lines)


def write_runs(run_folders: Sequence[Path], folder: Path, metrics: bool = False) -> None:
    """Write `folder`/runs.json and, with `metrics`, `folder`/metrics/NAME.jsonl of the runs in `run_folders`.

    Raises:
      InputError: a run folder lacks a file, or holds one that does not parse.
    """
    places = sorted(run_folders, key=lambda place: place.name)
    configs, envs, summaries = (
        [without_paths(read_json(place / file)) for place in places]
        for file in ("config.json", "env.json", "summary.json")
    )
    flat = [flatten(config) for config in configs]
    settings, env = _shared(flat), _shared(envs)
    config: dict[str, Any] = {}
    for key, value in settings.items():
        _set(config, key, value)
    lines = [
        {
            "name": place.name,
            "config": {key: value for key, value in flat[k].items() if key not in settings},
            "env": {key: value for key, value in envs[k].items() if key not in env},
            "summary": summaries[k],
        }
        for k, place in enumerate(places)
    ]
    shared = json.dumps({"config": config, "env": env}, indent=1).removesuffix("\n}")
    runs = ",\n".join(json.dumps(line) for line in lines)
    (folder / "runs.json").write_text(f'{shared},\n "runs": [\n{runs}\n ]\n}}\n')
    if metrics:
        (folder / "metrics").mkdir()
        for place in places:
            lines = (place / "metrics.jsonl").read_text().splitlines(keepends=True)
            kept = [json.dumps(without_paths(json.loads(line))) + "\n" if "/" in line else line for line in lines]
            (folder / "metrics" / f"{place.name}.jsonl").write_text("".join(kept))


def without_paths(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object as records keep it, with each absolute path cut to its last part.

    A text that begins with `/` is taken for a path or several paths between commas, which may have blanks.  Commands and
    error messages may begin with `/` too, and are cut as other texts.
    """
    return {key: _without_paths(entry, key in ("command", "error")) for key, entry in value.items()}


def _without_paths(value: Any, sentence: bool = False) -> Any:
    if isinstance(value, dict):
        return without_paths(value)
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if not value.startswith("/") or sentence:
        return shortened(value)
    return ",".join(part.rpartition("/")[2] if part.startswith("/") else shortened(part) for part in value.split(","))


def _shared(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that all mappings have in common.  Values are equal if their JSON texts are, so 1 differs from 1.0."""
    texts = [{key: json.dumps(value) for key, value in mapping.items()} for mapping in mappings]
    return {k: v for k, v in mappings[0].items() if all(text.get(k) == texts[0][k] for text in texts)}


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in a nested mapping."""
    *sections, leaf = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[leaf] = value


def read_record(folder: str | Path) -> list[RunRecord]:
    """Read the runs of a record, in the order of their names.

    If the record has no metrics of a run, the result has its summary, but no measurements over steps and no events.

    Raises:
      InputError: `folder` is not the record of a sweep.
    """
    folder = Path(folder)
    require((folder / "runs.json").is_file(), f"{folder} is no record of a sweep: it has no runs.json.")
    shared = read_json(folder / "runs.json")
    records = []
    for run in shared["runs"]:
        config = copy.deepcopy(shared["config"])
        for key, value in run["config"].items():
            _set(config, key, value)
        metrics = folder / "metrics" / f"{run['name']}.jsonl"
        records.append(
            run_of(
                folder / run["name"],
                run["name"],
                config,
                shared["env"] | run["env"],
                run["summary"],
                metrics if metrics.is_file() else None,
            )
        )
    return records


def newest_record(root: str | Path, name: str) -> Path | None:
    """Return the folder of the latest record of the sweep `name`, `root`/<date>-sweep-<name>, or None if there is none."""
    return max(Path(root).glob(f"????-??-??-sweep-{name}"), default=None)


def read_newest(root: str | Path, name: str) -> list[RunRecord]:
    """Return the runs of the latest record of the sweep `name`.  Its records are the folders `root`/<date>-sweep-<name>.

    Raises:
      InputError: there is no record of this sweep.
    """
    folder = newest_record(root, name)
    if folder is None:
        raise InputError(
            f"There is no record of the sweep {name!r} yet; make it with `python experiments/sweep.py "
            f"experiments/sweeps/{name}.py --workdir=runs/{name}` and `python experiments/record.py runs/{name} {name}`."
        )
    return read_record(folder)
