"""The record of a sweep: what of its folder is kept in the repository, with a page of numbers, and how it is read back.

A record holds README.md, results.csv, results.parquet and a folder a run with config.json, env.json, summary.json and, if wanted,
metrics.jsonl.  Checkpoints, locks and logs stay behind; of absolute paths only the last part is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mhc_jax.analysis.comparison import STATISTICS, findings, statistics_rows
from mhc_jax.analysis.grouping import ENDED, Baseline, group
from mhc_jax.analysis.records import RunRecord, flatten, not_defaults, read_run
from mhc_jax.errors import InputError, require
from mhc_jax.reports.page import changed_settings, markdown_table
from mhc_jax.runs.folder import read_json
from mhc_jax.sweeps.results import result_rows, write_table

MISSING = ("pending", "begun", "interrupted")
FOLDERS = re.compile(r"(?<![\w.*/:])/(?:[^\s/'\"=,:]+/)+")
"""The folders of an absolute path; those of a URL or a relative path are left."""


def shortened(text: str) -> str:
    """Text without the folders of absolute paths.

    >>> shortened("train.py --data=/home/me/texts/*.txt texts/a.txt")
    'train.py --data=*.txt texts/a.txt'
    """
    return FOLDERS.sub("", text)


def write_record(
    sweep_folder: Path, folder: Path, metrics: bool = False, unfinished: bool = False, note: str = ""
) -> Path:
    """Copy what a record keeps of a sweep; nothing in the sweep's folder is written.

    Args:
      sweep_folder: where `experiments/sweep.py` wrote.
      folder: of the record; must not exist.
      metrics: keep metrics.jsonl too.
      unfinished: accept runs that have not ended; they are left out, and counted in README.md.
      note: a sentence for README.md.

    Returns:
      `folder`.

    Raises:
      InputError: no sweep, one that is not finished, no run that has ended, or a record that is there already.
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
    require(not folder.exists(), f"The record {folder} is there already; remove it to write it anew.")
    records = [read_run(sweep_folder / name) for name in ended]
    sweep = read_json(sweep_folder / "sweep.json")
    text = page(sweep["title"], records, [row["status"] for row in rows], sweep.get("baseline") or None, note)
    files = ("config.json", "env.json", "summary.json") + (("metrics.jsonl",) if metrics else ())
    folder.mkdir(parents=True)
    for name in ended:
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text(shortened((sweep_folder / name / file).read_text()))
    write_table([{k: shortened(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows], folder)
    (folder / "README.md").write_text(text)
    return folder


def page(
    title: str,
    records: Sequence[RunRecord],
    states: Sequence[str],
    baseline: Baseline | None = None,
    note: str = "",
) -> str:
    """README.md of a record: command, date, device, commit, settings, what ended how, findings, statistics by setting.

    Args:
      title: of the sweep.
      records: the runs that ended.
      states: how each run of the sweep stands.
      baseline: as `grouping.group` takes it.
      note: a sentence for the reader.
    """
    envs = [record.env for record in records]
    dates = sorted(str(env["date"]) for env in envs)
    devices = ", ".join(sorted({f"{env['device_count']} x {env['device']}" for env in envs}))
    versions = ", ".join(sorted({f"jax {env['packages']['jax']}, Python {env['python']}" for env in envs}))
    commits = ", ".join(sorted({str(env["commit"])[:7] + " (changed files)" * bool(env["dirty"]) for env in envs}))
    counts = ", ".join(f"{list(states).count(state)} {state}" for state in dict.fromkeys(states))
    settings = group(records, baseline)
    flat = [flatten(record.config) for record in records]
    changed = not_defaults(records[0].config)
    shared = {key: value for key, value in changed.items() if all(other.get(key) == value for other in flat)}
    lines = [
        f"# {title}",
        "",
        *(f"    {command}" for command in dict.fromkeys(str(env["command"]) for env in envs)),
        "",
        f"Commit {commits}; {devices}; {versions}; begun {dates[0]}, last run {dates[-1]}. {len(states)} runs: {counts}.",
        changed_settings(shared),
        *([note] if note else []),
        "",
        *(f"- {sentence}" for sentence in findings(settings)),
        "",
        markdown_table(statistics_rows(settings)),
        "",
        STATISTICS,
    ]
    return shortened("\n".join(lines) + "\n")


def read_record(folder: str | Path) -> list[RunRecord]:
    """Runs of a record, by name; without metrics.jsonl a run has its summary and no curves.

    Raises:
      InputError: no record.
    """
    folder = Path(folder)
    found = sorted(path.parent for path in folder.glob("*/summary.json"))
    require(bool(found), f"{folder} is no record of a sweep: it holds no run with a summary.json.")
    return [read_run(place, metrics=(place / "metrics.jsonl").is_file()) for place in found]


def read_newest(root: str | Path, name: str) -> list[RunRecord]:
    """Return the runs of the latest record `<date>-sweep-<name>` in `root`.

    Raises:
      InputError: there is none.
    """
    folder = max(Path(root).glob(f"????-??-??-sweep-{name}"), default=None)
    if folder is None:
        raise InputError(
            f"There is no record of the sweep {name!r} yet; make it with `python experiments/sweep.py "
            f"experiments/sweeps/{name}.py --workdir=runs/{name}` and `python experiments/record.py runs/{name} {name}`."
        )
    return read_record(folder)
