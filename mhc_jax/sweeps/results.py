"""The table of a sweep: one tidy row a run, as CSV and Parquet."""

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

from mhc_jax.analysis.records import RunRecord, flatten, read_run, series
from mhc_jax.connections import spec_of_mapping
from mhc_jax.errors import InputError
from mhc_jax.runs.folder import read_json
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
"""Of summary.json, as `loop.train` wrote them."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Write `workdir`/results.csv and results.parquet, each atomically, and return the rows.

    Columns: run, status, connection (its spec), kind, seed (train.seed), data_seed; every other setting that differs between
    runs, by its dotted key; the measurements (losses in nats/token, times in s); device, commit, date, error.  Empty where a run
    has no such value.
    """
    with (workdir / ".sweep" / "results.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = result_rows(workdir)
        write_table(rows, workdir / ".sweep")
        for name in ("results.csv", "results.parquet"):
            os.replace(workdir / ".sweep" / name, workdir / name)
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write rows of the same keys as `folder`/results.csv and results.parquet."""
    table = pa.table({key: _column([row[key] for row in rows]) for key in rows[0]})
    pyarrow.csv.write_csv(table, str(folder / "results.csv"))
    pyarrow.parquet.write_table(table, str(folder / "results.parquet"))


def result_rows(workdir: Path) -> list[dict[str, Any]]:
    """Rows of every run of the sweep, begun or not.

    Raises:
      InputError: `workdir` is no folder of a sweep.
    """
    entries = list(read_plan(workdir).values())
    flat = [flatten(entry["config"]) for entry in entries]
    keys = sorted(set().union(*flat) - {"train.seed", "data.seed", "model.connection.kind"})
    varying = [key for key in keys if len({json.dumps(f.get(key)) for f in flat}) > 1]
    rows = []
    for entry, settings in zip(entries, flat, strict=True):
        name, kind = entry["name"], settings["model.connection.kind"]
        rows.append(
            {
                "run": name,
                "status": run_status(workdir, name),
                "connection": spec_of_mapping(entry["config"]["model"]["connection"]),
                "kind": kind,
                "seed": settings["train.seed"],
                "data_seed": settings["data.seed"],
                **{key: settings.get(key) for key in varying},
                **measurements(_record(workdir / name)),
                "error": failure(workdir, name).get("error"),
            }
        )
    return rows


def run_status(workdir: Path, name: str) -> str:
    """`finished`, `diverged`, `interrupted`, `failed`, `begun` (running, or killed) or `pending`."""
    summary = workdir / name / "summary.json"
    if summary.is_file():
        return read_json(summary)["status"]
    if failure(workdir, name):
        return "failed"
    return "begun" if (workdir / name / "metrics.jsonl").is_file() else "pending"


def failure(workdir: Path, name: str) -> Mapping[str, Any]:
    """What is recorded of a run's last failure: `exit` and `error`; empty without one."""
    path = workdir / ".sweep" / "failed" / f"{name}.json"
    return read_json(path) if path.is_file() else {}


def measurements(record: RunRecord | None) -> dict[str, Any]:
    """Numbers of one run, None where it has none.

    `max_grad_norm` is over logged steps after the warm-up (before clipping), `clipped_fraction` over all logged steps.
    """
    out: dict[str, Any] = dict.fromkeys(
        (*SUMMARY_KEYS, "max_grad_norm", "clipped_fraction", "device", "commit", "date"), None
    )
    if record is None:
        return out
    out |= {key: record.result(key) for key in SUMMARY_KEYS}
    steps, norms = series(record, "train", "grad_norm")
    late = norms[(steps > flatten(record.config).get("optimizer.warmup_steps", 0)) & np.isfinite(norms)]
    clipped = series(record, "train", "clipped")[1]
    out["max_grad_norm"] = float(late.max()) if len(late) else None
    out["clipped_fraction"] = float(np.mean(clipped)) if len(clipped) else None
    return out | {key: record.env.get(key) for key in ("device", "commit", "date")}


def _record(folder: Path) -> RunRecord | None:
    """The run, or None before its first line is written."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    try:
        return read_run(folder)
    except InputError:  # read while the process was rewriting it
        return None


def _column(values: list[Any]) -> pa.Array:
    """One type a column; lists, and kinds of values that do not mix, as JSON text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if v is None else float(v) for v in values])
    if len(kinds) <= 1 and not kinds & {list, dict}:
        return pa.array(values, None if kinds else pa.string())
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
