"""The work of `experiments/compile.py`: the train steps of several connections on one slice, their table, the largest batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.planning.compile_ahead import cached, estimate, key_of
from mhc_jax.planning.slices import Slice
from mhc_jax.runs.progress import Progress

Estimate = Callable[[ExperimentConfig], dict[str, Any]]


def with_connection(config: ExperimentConfig, kind: str) -> ExperimentConfig:
    """`config` with another connection, `kind:key=value`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, connection=connections.parse(kind)))


def with_batch(config: ExperimentConfig, batch_size: int) -> ExperimentConfig:
    """`config` with another batch."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))


def estimates(
    config: ExperimentConfig,
    kinds: Sequence[str],
    where: Slice,
    implementation: str | None,
    folder: Path,
    largest: bool,
) -> list[dict[str, Any]]:
    """A row a connection, as `compile_ahead.estimate` gives it, and with `largest` also `largest_batch`."""
    configs = {kind: with_connection(config, kind) for kind in kinds}  # mistakes before the first compile
    rows = []
    with Progress("compile", "connections", len(configs)) as progress:

        def known(name: str) -> Estimate:
            def one(config: ExperimentConfig) -> dict[str, Any]:
                program, began = f"{name}, {config.data.batch_size} sequences", time.monotonic()
                progress.say(f"{program} ...")
                key = key_of(config, where, implementation)
                row, old = cached(key, folder, lambda: estimate(config, where, implementation))
                needs = "an unknown amount" if row["needs"] is None else f"{row['needs'] / 2**30:.1f} GiB"
                verdict = f"{'fits' if row['fits'] else 'does not fit'} ({needs} a device)"
                told = f"{verdict}, {'known' if old else 'compiled'} ({row['compile_s']:.0f} s)"
                progress.say(f"{program}: {told} after {time.monotonic() - began:.0f} s")
                return row

            return one

        for kind, own in configs.items():
            row = {**known(kind)(own), "connection": kind}
            if largest:
                row["largest_batch"] = largest_batch(own, row["hbm"], known(kind))
            rows.append(row)
            progress.advance(1)
    return rows


def largest_batch(config: ExperimentConfig, hbm: int, one: Estimate) -> dict[str, Any]:
    """The most sequences a step that fit, in the same mesh and number of accumulation steps.

    Memory is taken as linear in the sequences of one device and accumulation step, from compiles of 1 and 2; the largest that
    fits by that is compiled, and smaller ones after it until one does.

    Returns:
      `sequences` a step (0: not one fits), `per_device` of one accumulation step, `predicted` and `needs`, bytes.
    """
    unit = config.mesh.batch * config.optimizer.accumulation_steps
    first, second = one(with_batch(config, unit)), one(with_batch(config, 2 * unit))
    if not first["fits"]:
        return {"sequences": 0, "per_device": 0, "predicted": first["needs"], "needs": first["needs"]}
    slope = max((second["needs"] or hbm) - first["needs"], 1)
    k = max(1, min(1 + (hbm - first["needs"]) // slope, 4096))
    while k > 1:
        found = one(with_batch(config, k * unit))
        if found["fits"]:
            break
        over = ((found["needs"] or hbm) - hbm) // slope
        k = max(1, k - max(1, over))
    needs = found["needs"] if k > 1 else first["needs"]
    return {
        "sequences": k * unit,
        "per_device": k,
        "predicted": first["needs"] + (k - 1) * slope,
        "needs": needs,
    }


def table(rows: Sequence[dict[str, Any]], where: Slice) -> str:
    """Markdown: memory and time of a step, then its collectives.  Overheads are over the first row that fits."""
    out = [
        "| connection | parameters (GiB) | optimizer (GiB) | gradients (GiB) | streams (GiB) | logits (GiB) | HBM (GiB) | fits "
        "| TFLOP | GB moved | compute (ms) | collectives (ms) | longest wait (ms) | step (ms) | over the first that fits | MFU |",
        "| --- " * 16 + "|",
    ]
    base = next((row["seconds"]["step"] for row in rows if "seconds" in row), None)
    for row in rows:
        shapes = " | ".join(f"{size / 2**30:.2f}" for size in row["by_shape"].values())
        needs = "?" if row["needs"] is None else f"{row['needs'] / 2**30:.2f}"
        head = (
            f"| {row['connection']} | {shapes} | {needs} of {row['hbm'] / 2**30:.2f} | {'yes' if row['fits'] else 'no'}"
        )
        if "seconds" not in row:
            out.append(f"{head} | | | | | | | | |")
            continue
        seconds = row["seconds"]
        work = f"{row['flops'] / 1e12:.2f} | {row['bytes'] / 1e9:.1f}"
        times = " | ".join(f"{1e3 * seconds[key]:.1f}" for key in ("compute", "collectives", "waiting", "step"))
        over = f"{100 * (seconds['step'] / base - 1):+.1f} %"
        mfu = f"{100 * row['mfu']:.1f} to {100 * row['mfu, collectives hidden']:.1f} %"
        out.append(f"{head} | {work} | {times} | {over} | {mfu} |")
    out += ["", "| connection | collective | axes | devices | times | GB in all | ms |", "| --- " * 7 + "|"]
    for row in rows:
        merged: dict[tuple[str, str, int], list[float]] = {}
        for one in row.get("collectives", []):
            sums = merged.setdefault((one["kind"], one["axes"], one["group"]), [0, 0.0, 0.0])
            sums[0] += one["count"]
            sums[1] += one["count"] * one["bytes"]
            sums[2] += one["seconds"]
        for (kind, axes, group), (count, size, seconds) in merged.items():
            numbers = f"{count} | {size / 1e9:.2f} | {1e3 * seconds:.1f}"
            out.append(f"| {row['connection']} | {kind} | {axes} | {group} | {numbers} |")
    for row in rows:
        if found := row.get("largest_batch"):
            note = f"{found['sequences']} sequences a step ({found['per_device']} a device and accumulation step)"
            needs = "?" if found["needs"] is None else f"{found['needs'] / 2**30:.2f}"
            out += ["", f"{row['connection']}: at most {note}, {needs} GiB."]
    out += pipelines(rows)
    without = sorted({name for row in rows for name in row.get("kernels", {}) if name.endswith("(no estimate)")})
    if without:
        out += ["", f"Kernels that count as no time: {', '.join(without)}."]
    if where.platform == "cpu":
        out += ["", "Times are of no machine: a CPU stands for TPUs."]
    return "\n".join(out)


def pipelines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table of the operations of stages, of rows that have them; the dearest stage's."""
    if not any("pipeline" in row for row in rows):
        return []
    times = "F (ms) | B (ms) | W (ms) | F&B over F + B | message (ms) | waiting (%)"
    sent = "messages a tick | asynchronous | hidden"
    out = ["", f"| connection | schedule | stages | {times} | {sent} |", "| --- " * 12 + "|"]
    for row in rows:
        if found := row.get("pipeline"):
            times = [f"{1e3 * max(found['seconds'][kind]):.2f}" for kind in "FBW"]
            times += [f"{found['pair']:.2f}", f"{1e3 * found['seconds']['message']:.2f}"]
            sent = [str(found["messages"][name]) for name in ("a tick", "asynchronous", "hidden")]
            cells = [row["connection"], found["schedule"], str(found["stages"]), *times]
            out.append("| " + " | ".join([*cells, f"{100 * found['bubble_fraction']:.1f}", *sent]) + " |")
    return out
