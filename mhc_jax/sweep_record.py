"""The record of a sweep: what of its folder is kept in the repository, with a page of numbers, and how it is read back.

A record holds README.md, results.csv, results.parquet and a folder a run with config.json, env.json, summary.json and, if wanted,
metrics.jsonl.  Checkpoints, locks and logs stay behind; of absolute paths only the last part is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhc_jax.comparison import Cell
from mhc_jax.errors import require
from mhc_jax.mapping import completed, to_mapping
from mhc_jax.records import RunRecord, flatten, read_run
from mhc_jax.results import result_rows, write_table
from mhc_jax.run_folder import read_json
from mhc_jax.settings import group
from mhc_jax.sweep import load_sweep
from mhc_jax.sweep_report import STATISTICS, findings, statistics_rows

ENDED = ("finished", "diverged")
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
    sweep_folder: Path, sweep_file: Path, folder: Path, metrics: bool = False, unfinished: bool = False, note: str = ""
) -> Path:
    """Copy what a record keeps of a sweep; nothing in the sweep's folder is written.

    Args:
      sweep_folder: where `experiments/sweep.py` wrote.
      sweep_file: the sweep's Python file; settings in which the runs differ from it are told as `--set`.
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
    text = page(records, rows, sweep_folder, sweep_file, note)
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
    records: Sequence[RunRecord], rows: Sequence[Mapping[str, Any]], sweep_folder: Path, sweep_file: Path, note: str
) -> str:
    """README.md of a record: command, date, device, commit, what ended how, findings, paired statistics."""
    envs = [record.env for record in records]
    dates = sorted(str(env["date"]) for env in envs)
    devices = ", ".join(sorted({f"{env['device_count']} x {env['device']}" for env in envs}))
    versions = ", ".join(sorted({f"jax {env['packages']['jax']}, Python {env['python']}" for env in envs}))
    commits = ", ".join(sorted({str(env["commit"])[:7] + " (changed files)" * bool(env["dirty"]) for env in envs}))
    states = [row["status"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    settings = group(records)
    table = statistics_rows(settings)
    lines = [
        f"# {read_json(sweep_folder / 'sweep.json')['title']}",
        "",
        f"    {command(records[0], sweep_file)}",
        "",
        f"Commit {commits}; {devices}; {versions}; begun {dates[0]}, last run {dates[-1]}. {len(rows)} runs: {counts}.",
        *([note] if note else []),
        "",
        *(f"- {sentence}" for sentence in findings(settings)),
        "",
        markdown_table(table),
        "",
        STATISTICS,
    ]
    return shortened("\n".join(lines) + "\n")


def markdown_table(table: Sequence[Mapping[str, Cell]]) -> str:
    """Rows of the same headings, such as those of `comparison.rows`, as Markdown."""
    body = [[cell.text for cell in row.values()] for row in table]
    lines = [list(table[0]), ["---"] * len(table[0]), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(record: RunRecord, sweep_file: Path) -> str:
    """The command of a sweep, from what one of its runs has other than the sweep's file says."""
    _, planned = load_sweep(sweep_file)
    ours = {run.name: run.config for run in planned}
    require(
        record.name in ours, f"{sweep_file} has no run {record.name!r}; give the file that the sweep was started with."
    )
    # Through JSON, which makes lists of tuples, as in the run's config.json.
    plan = flatten(json.loads(json.dumps(to_mapping(ours[record.name]))))
    done = flatten(completed(record.config, to_mapping(ours[record.name])))
    changed = [f"--set={key}={value}" for key, value in done.items() if plan.get(key) != value]
    name = sweep_file.stem
    return " ".join([f"python experiments/sweep.py experiments/sweeps/{name}.py --workdir=runs/{name}", *changed])


def read_record(folder: str | Path) -> list[RunRecord]:
    """Runs of a record, by name; without metrics.jsonl a run has its summary and no curves.

    Raises:
      InputError: no record.
    """
    folder = Path(folder)
    found = sorted(path.parent for path in folder.glob("*/summary.json"))
    require(bool(found), f"{folder} is no record of a sweep: it holds no run with a summary.json.")
    return [read_run(place, metrics=(place / "metrics.jsonl").is_file()) for place in found]


def newest_record(root: str | Path, name: str) -> Path | None:
    """The latest `<date>-sweep-<name>` in `root`, or None."""
    return max(Path(root).glob(f"????-??-??-sweep-{name}"), default=None)


def how_to_make(name: str) -> str:
    """The sentence that stands where a record is missing."""
    return (
        f"There is no record of the sweep {name!r} yet; make it with `python experiments/sweep.py "
        f"experiments/sweeps/{name}.py --workdir=runs/{name}` and `python experiments/record.py runs/{name} {name}`."
    )
