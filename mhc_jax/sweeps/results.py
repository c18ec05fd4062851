"""The results table of a sweep, with one row for each run, as CSV and Parquet."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mhc_jax.analysis.run_reader import RunRecord, flatten, read_run, series
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec_of_mapping
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.runs.folder import read_summary
from mhc_jax.sweeps.grid import read_plan

SUMMARY_KEYS = (
    "steps",
    "parameters",
    "train_loss",
    "validation_loss",
    "bits_per_byte",
    "max_composite_forward",
    "max_composite_backward",
    "max_column_error",
    "final_stream_cosine",
    "final_stream_cosine_abs",
    "final_stream_rank",
    "spikes",
    "first_nonfinite_step",
    "step_time_s",
    "flops_per_token",
)
"""Keys of summary.json whose numbers are copied into the results table."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Write `workdir`/results.csv and results.parquet, each atomically, and return the rows.

    The columns are run, status, connection (a text such as `mhc:init=paper`), kind, seed (train.seed) and data_seed; then every
    other setting that differs between runs, under its dotted key; then the measurements (losses in nats/token, times in seconds),
    device, commit, date and error: why the run failed, or why the folder of a run that has ended cannot be read.  A cell is
    empty if the run has no such value.
    """
    with (workdir / ".sweep" / "results.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = result_rows(workdir)
        write_csv(rows, workdir / ".sweep")
        pyarrow.parquet.write_table(_table(rows), str(workdir / ".sweep" / "results.parquet"))
        for name in ("results.csv", "results.parquet"):
            os.replace(workdir / ".sweep" / name, workdir / name)
    return rows


def write_csv(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write rows of the results table, which share their keys, to `folder`/results.csv."""
    pyarrow.csv.write_csv(_table(rows), str(folder / "results.csv"))


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.table({key: _column([row[key] for row in rows]) for key in rows[0]})


def result_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return one row of the results table for every run of the sweep, also for runs that have not begun.

    Raises:
      InputError: `workdir` is not the folder of a sweep.
    """
    plan = read_plan(workdir)
    records = {name: _record(workdir / name) for name in plan}
    # What a run was trained with stands in its own folder.  A setting that an older version did not have is at its default.
    configs = {name: run.config if (run := records[name][0]) else config for name, config in plan.items()}
    defaults = flatten(to_mapping(ExperimentConfig()))
    general = {key: value for key, value in defaults.items() if not key.startswith("model.connection.")}
    flat = {name: general | flatten(config) for name, config in configs.items()}
    keys = sorted(set().union(*flat.values()) - {"train.seed", "data.seed", "model.connection.kind"})
    varying = [key for key in keys if len({json.dumps(settings.get(key)) for settings in flat.values()}) > 1]
    return [
        {
            "run": name,
            "status": run_status(workdir, name),
            "connection": spec_of_mapping(configs[name]["model"]["connection"]),
            "kind": settings["model.connection.kind"],
            "seed": settings["train.seed"],
            "data_seed": settings["data.seed"],
            **{key: settings.get(key) for key in varying},
            **measurements(records[name][0]),
            "error": _error(failure_file(workdir, name)) or records[name][1],
        }
        for name, settings in flat.items()
    ]


def run_status(workdir: Path, name: str) -> str:
    """Return the status of a run: `finished`, `diverged`, `interrupted`, `failed`, `begun` (running or killed) or `pending`."""
    if summary := read_summary(workdir / name):
        return summary["status"]
    if failure_file(workdir, name).is_file():
        return "failed"
    return "begun" if (workdir / name / "metrics.jsonl").is_file() else "pending"


def failure_file(workdir: Path, name: str) -> Path:
    """Return the path of the JSON file with the exit status (`exit`) and the error message (`error`) of a run's last failure.

    The file does not exist if the run has not failed since its last start.
    """
    return workdir / ".sweep" / "failed" / f"{name}.json"


def _error(file: Path) -> str | None:
    """Return the error message in a `failure_file`, or None if there is no such file."""
    try:
        return str(read_json(file).get("error")) if file.is_file() else None
    except InputError as damaged:
        return str(damaged)


def measurements(record: RunRecord | None) -> dict[str, Any]:
    """Return the measurements of one run for the results table.  All are None if `record` is None.

    `max_grad_norm` is the largest finite gradient norm before clipping, at the logged steps after the warm-up of the learning rate.
    `clipped_fraction` is the fraction of all logged steps whose gradient was clipped.
    """
    out: dict[str, Any] = dict.fromkeys(
        (*SUMMARY_KEYS, "max_grad_norm", "clipped_fraction", "device", "commit", "date"), None
    )
    if record is None:
        return out
    out |= {key: record.result(key) for key in SUMMARY_KEYS}
    steps, norms = series(record, "train", "grad_norm")
    late = norms[(steps > record.config["optimizer"]["warmup_steps"]) & np.isfinite(norms)]
    clipped = series(record, "train", "clipped")[1]
    out["max_grad_norm"] = float(late.max()) if len(late) else None
    out["clipped_fraction"] = float(np.mean(clipped)) if len(clipped) else None
    return out | {key: record.env.get(key) for key in ("device", "commit", "date")}


def _record(folder: Path) -> tuple[RunRecord | None, str | None]:
    """Read a run folder.  Return what it holds, or None, and why a run that has ended cannot be read, or None.

    There is nothing to read before the run has written metrics.jsonl, and while another process writes a file of the folder.
    """
    ended = read_summary(folder) is not None
    if not ended and not (folder / "metrics.jsonl").is_file():
        return None, None
    try:
        return read_run(folder), None
    except InputError as damaged:
        return None, str(damaged) if ended else None


def _column(values: list[Any]) -> pa.Array:
    """Return the values of a column as an array of one type.  Values of a column with lists or several types become JSON text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if v is None else float(v) for v in values])
    if len(kinds) <= 1 and not kinds & {list, dict}:
        return pa.array(values, None if kinds else pa.string())
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
