"""Write and read the record of a sweep: the small part of the sweep's folder that the repository keeps.

A record holds README.md, results.csv, results.parquet and a folder for each run with config.json, env.json, summary.json and, if
wanted, metrics.jsonl.  Checkpoints, locks and logs are not copied.  In the files, absolute paths are cut to their last part.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mhc_jax.analysis.comparison import STATISTICS, findings, statistics_rows
from mhc_jax.analysis.grouping import ENDED, Baseline, group
from mhc_jax.analysis.run_reader import RunRecord, read_run
from mhc_jax.errors import InputError, require
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.page import changed_settings
from mhc_jax.runs.folder import read_json
from mhc_jax.sweeps.results import result_rows, write_table

MISSING = ("pending", "begun", "interrupted")
"""Values of `run_status` for runs that have not ended and may still finish."""
FOLDERS = re.compile(r"(?<![\w.*/:])/(?:[^\s/'\"=,:]+/)+")
"""Pattern that matches the folders of an absolute path, but not the folders of a URL or a relative path."""


def shortened(text: str) -> str:
    """Return `text` with each absolute path cut to its last part.

    >>> shortened("train.py --data=/home/me/texts/*.txt texts/a.txt")
    'train.py --data=*.txt texts/a.txt'
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
    require(not folder.exists(), f"The record {folder} is there already; remove it to write it anew.")
    sweep = read_json(sweep_folder / "sweep.json")
    records = [read_run(sweep_folder / name) for name in ended]
    text = _page(sweep["title"], records, [row["status"] for row in rows], sweep["baseline"] or None, note)
    target, folder = folder, _aside(folder)
    for name in ended:
        (folder / name).mkdir()
        for file in ("config.json", "env.json", "summary.json", *(["metrics.jsonl"] if metrics else [])):
            (folder / name / file).write_text(shortened((sweep_folder / name / file).read_text()))
    write_table([{k: shortened(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows], folder)
    (folder / "README.md").write_text(shortened(text))
    try:
        folder.rename(target)
    except OSError as error:
        raise InputError(f"The record {target} cannot be written: {error.strerror}.") from error
    return target


def _aside(folder: Path) -> Path:
    """Make an empty folder beside `folder`, in which a record is written until it is whole.  Remove what a kill has left there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]:
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    aside.chmod(0o755)
    return aside


def _page(title: str, records: Sequence[RunRecord], states: Sequence[str], baseline: Baseline | None, note: str) -> str:
    """Return the text of a record's README.md.

    It holds the command, commits, devices and dates of the runs, how they ended, the findings, and the table of variants.

    Args:
      title: title of the sweep.
      records: the runs that ended.
      states: `run_status` of each run of the sweep.
      baseline: settings of the baseline, as `grouping.group` takes them.
      note: a sentence to add to the text, or empty.
    """
    envs = [record.env for record in records]
    dates = sorted(str(env["date"]) for env in envs)
    commits = {str(env["commit"])[:7] + " (changed files)" * bool(env["dirty"]) for env in envs}
    devices = {f"{env['device_count']} x {env['device']}" for env in envs}
    versions = {f"jax {env['packages']['jax']}, Python {env['python']}" for env in envs}
    made = "; ".join(", ".join(sorted(values)) for values in (commits, devices, versions))
    counts = ", ".join(f"{list(states).count(state)} {state}" for state in dict.fromkeys(states))
    variants = group(records, baseline)
    lines = [
        f"# {title}",
        "",
        *(f"    {command}" for command in dict.fromkeys(str(env["command"]) for env in envs)),
        "",
        f"Commit {made}; begun {dates[0]}, last run {dates[-1]}. {len(states)} runs: {counts}.",
        changed_settings(records),
        *([note] if note else []),
        "",
        *(f"- {sentence}" for sentence in findings(variants)),
        "",
        markdown_table(statistics_rows(variants)),
        "",
        STATISTICS,
        "",
    ]
    return "\n".join(lines)


def read_record(folder: str | Path) -> list[RunRecord]:
    """Read the runs of a record, in the order of their names.

    If the record has no metrics.jsonl of a run, the result has its summary, but no measurements over steps and no events.

    Raises:
      InputError: `folder` is not the record of a sweep.
    """
    folder = Path(folder)
    places = sorted(path.parent for path in folder.glob("*/summary.json"))
    require(bool(places), f"{folder} is no record of a sweep: it holds no run with a summary.json.")
    return [read_run(place, metrics=(place / "metrics.jsonl").is_file()) for place in places]


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
