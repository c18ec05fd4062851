"""Estimates for a train step with each of several connections on one slice: tables of them, and the largest batch that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.planning.estimate_cache import cached
from mhc_jax.planning.slices import Slice
from mhc_jax.planning.step_estimate import estimate
from mhc_jax.runs.progress import Progress

Row = dict[str, Any]


def estimates(
    config: ExperimentConfig,
    kinds: Sequence[str],
    where: Slice,
    implementation: str | None,
    folder: Path,
    largest: bool,
) -> list[Row]:
    """Estimate the memory and time of a train step with each of several connections.

    Args:
      config: the configuration of the step.  Its connection is replaced by each of `kinds`.
      kinds: connections as `connections.parse` takes them.
      where: the slice to compile for.
      implementation: name of the implementation of the connections' operations.  None takes the platform's default.
      folder: folder of the cached results.
      largest: whether to search for the largest batch that fits as well.

    Returns:
      A row for each connection, as `step_estimate.estimate` returns it.  With `largest` it has an entry `largest_batch` as well.
    """
    # All configurations are made first, so that a mistake in one is reported before the first compile.
    configs = {kind: config.with_settings(model={"connection": connections.parse(kind)}) for kind in kinds}
    rows = []
    with Progress("compile", "connections", len(configs)) as progress:

        def known(kind: str, config: ExperimentConfig) -> Row:
            program, began = f"{kind}, {config.data.batch_size} sequences", time.monotonic()
            progress.say(f"{program} ...")
            key = {"config": to_mapping(config), "topology": where.name, "implementation": implementation}
            row, old = cached(key, folder, lambda: estimate(config, where, implementation))
            needs = "an unknown amount" if row["needs"] is None else f"{row['needs'] / 2**30:.1f} GiB"
            verdict = f"{'fits' if row['fits'] else 'does not fit'} ({needs} a device)"
            result = f"{verdict}, {'known' if old else 'compiled'} ({row['compile_s']:.0f} s)"
            progress.say(f"{program}: {result} after {time.monotonic() - began:.0f} s")
            return row

        for kind, with_kind in configs.items():
            row = {**known(kind, with_kind), "connection": kind}
            if largest:
                row["largest_batch"] = largest_batch(with_kind, row["hbm"], lambda c, kind=kind: known(kind, c))
            rows.append(row)
            progress.advance(1)
    return rows


def largest_batch(config: ExperimentConfig, hbm: int, estimate: Callable[[ExperimentConfig], Row]) -> dict[str, Any]:
    """Search for the largest number of sequences per step that fits, with the mesh and accumulation steps of the configuration.

    Memory is assumed to be linear in the number of sequences of one device and accumulation step.  Steps with 1 and 2 such
    sequences are compiled to find the line.  Then the largest number that fits by this line is compiled, and smaller numbers until
    one fits.

    Args:
      config: the configuration of the step.  Its batch size is replaced.
      hbm: memory of a device in bytes.
      estimate: a function that compiles the step of a configuration and returns its row.

    Returns:
      A dict of `sequences` (number per step, or 0 if not even the smallest batch fits), `per_device` (number per device and
      accumulation step), and `needs` (bytes that the step needs on a device).
    """
    unit = config.mesh.batch * config.optimizer.accumulation_steps

    def compiled(k: int) -> Row:
        return estimate(config.with_settings(data={"batch_size": k * unit}))

    first, second = compiled(1), compiled(2)
    if not first["fits"]:
        return {"sequences": 0, "per_device": 0, "needs": first["needs"]}
    slope = max((second["needs"] or hbm) - first["needs"], 1)
    k = max(1, min(1 + (hbm - first["needs"]) // slope, 4096))
    row = first
    while k > 1 and not (row := compiled(k))["fits"]:
        over = ((row["needs"] or hbm) - hbm) // slope
        k = max(1, k - max(1, over))
    needs = row["needs"] if k > 1 else first["needs"]
    return {"sequences": k * unit, "per_device": k, "needs": needs}


def markdown(rows: Sequence[Row], where: Slice) -> str:
    """Return the rows of `estimates` as Markdown: tables of the steps, their collectives and their pipelines, with notes."""
    out = [*_steps(rows), "", *_collectives(rows)]
    for row in rows:
        if largest := row.get("largest_batch"):
            sizes = f"{largest['sequences']} sequences a step ({largest['per_device']} a device and accumulation step)"
            out += ["", f"{row['connection']}: at most {sizes}, {_gib(largest['needs'])} GiB."]
    out += pipelines(rows)
    for row in rows:
        if sentence := gathers_by_sums(row):
            out += ["", sentence]
    without = sorted({name for row in rows for name in row.get("kernels", {}) if name.endswith("(no estimate)")})
    if without:
        out += ["", f"Kernels that count as no time: {', '.join(without)}."]
    if where.platform == "cpu":
        out += ["", "Times are of no machine: a CPU stands for TPUs."]
    return "\n".join(out)


def _steps(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of each step's memory and time, the time also relative to the first step that fits."""
    out = [
        "| connection | parameters (GiB) | optimizer (GiB) | gradients (GiB) | streams (GiB) | logits (GiB) | HBM (GiB) | fits "
        "| TFLOP | GB moved | compute (ms) | collectives (ms) | longest wait (ms) | step (ms) | over the first that fits | MFU |",
        "| --- " * 16 + "|",
    ]
    base = next((row["seconds"]["step"] for row in rows if "seconds" in row), None)
    for row in rows:
        sizes = [_gib(size) for size in row["by_shape"].values()]
        cells = [
            row["connection"],
            *sizes,
            f"{_gib(row['needs'])} of {_gib(row['hbm'])}",
            "yes" if row["fits"] else "no",
        ]
        if seconds := row.get("seconds"):
            cells += [f"{row['flops'] / 1e12:.2f}", f"{row['bytes'] / 1e9:.1f}"]
            cells += [f"{1e3 * seconds[key]:.1f}" for key in ("compute", "collectives", "waiting", "step")]
            cells += [f"{100 * (seconds['step'] / base - 1):+.1f} %"]
            cells += [f"{100 * row['mfu']:.1f} to {100 * row['mfu, collectives hidden']:.1f} %"]
        else:
            cells += [""] * 8
        out.append(line(cells))
    return out


def _collectives(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of each step's collectives.  Those of equal kind, axes and group size are added up."""
    out = ["| connection | collective | axes | devices | times | GB in all | ms |", "| --- " * 7 + "|"]
    for row in rows:
        merged: dict[tuple[str, str, int], list[float]] = {}
        for collective in row.get("collectives", []):
            key = (collective["kind"], collective["axes"], collective["group"])
            sums = merged.setdefault(key, [0, 0.0, 0.0])
            sums[0] += collective["count"]
            sums[1] += collective["count"] * collective["bytes"]
            sums[2] += collective["seconds"]
        for key, (count, size, seconds) in merged.items():
            out.append(
                line([row["connection"], *map(str, key), str(count), f"{size / 1e9:.2f}", f"{1e3 * seconds:.1f}"])
            )
    return out


def gathers_by_sums(row: Row) -> str:
    """Return a sentence that warns of a mesh on which libtpu gathers parameters by all-reduces, or an empty text.

    Over `fsdp` a step gathers every parameter at least twice, and sums every gradient once.  More bytes in all-reduces than in
    all-gathers are therefore gathers of which the compiler has made all-reduces.
    """
    over_fsdp = [one for one in row.get("collectives", []) if "fsdp" in one["axes"].split("+")]
    sums, gathers = (
        [one for one in over_fsdp if one["kind"] == kind and one["group"] > 1] for kind in ("all-reduce", "all-gather")
    )
    size, gathered = (sum(one["count"] * one["bytes"] for one in group) for group in (sums, gathers))
    if size <= gathered:
        return ""
    return (
        f"{row['connection']}: parameters are gathered over fsdp by all-reduces, which send about twice as much as all-gathers "
        f"({size / 1e9:.0f} GB, {1e3 * sum(one['seconds'] for one in sums):.0f} ms a step); on another mesh, as --mesh=best "
        "finds it, the step is likely faster."
    )


def pipelines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of pipelines, with each operation's longest time on a stage.  Without a pipeline return []."""
    if not any("pipeline" in row for row in rows):
        return []
    times = "F (ms) | B (ms) | W (ms) | F&B over F + B | message (ms) | waiting (%)"
    sent = "messages a tick | asynchronous | hidden"
    out = ["", f"| connection | schedule | stages | {times} | {sent} |", "| --- " * 12 + "|"]
    for row in rows:
        if pipeline := row.get("pipeline"):
            seconds = pipeline["seconds"]
            cells = [row["connection"], pipeline["schedule"], str(pipeline["stages"])]
            cells += [f"{1e3 * max(seconds[kind]):.2f}" for kind in "FBW"]
            cells += [f"{pipeline['pair']:.2f}", f"{1e3 * seconds['message']:.2f}"]
            cells += [f"{100 * pipeline['bubble_fraction']:.1f}"]
            cells += [str(pipeline["messages"][name]) for name in ("a tick", "asynchronous", "hidden")]
            out.append(line(cells))
    return out


def line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f}"
