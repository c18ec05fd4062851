"""The report that `experiments/device_report.py` writes: what is measured, in which order, and the files report.json and README.md.

A part of the report is one task at one workload (a size of the arguments or layers).  The tasks are:

    correct   compare results and gradients of one operation with those in float64
    bench     time one operation
    step      time train steps
    repeat    call one operation again and again, and compare the bits of its results and gradients
    gradient  compute the gradient of a model again and again, and compare its bits
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhc_kernels import measure
from mhc_kernels.ops.arg_specs import OPS, SPECS

from mhc_jax.timing import step_times

REPEATS = 20
BOUNDARY_FIRST = ("write_read", "write", "read", "coefficients", "sinkhorn")


def plan(tiny: bool) -> list[str]:
    """Return the names of the parts of the report, `<task>/<workload>[/<operation>]`, the most important ones first.

    Args:
      tiny: whether to choose small workloads, which a CPU can run.
    """
    if tiny:
        ops = [f"{task}/tiny/{op}" for task in ("correct", "bench") for op in BOUNDARY_FIRST]
        return [*ops, "step/tiny", "repeat/tiny/write_read", "gradient/tiny", "correct/tiny-bf16/write_read"]
    first = [f"{task}/27b/{op}" for task in ("correct", "bench") for op in BOUNDARY_FIRST]
    repeats = [f"repeat/27b/{op}" for op in OPS]
    correct = [f"correct/{name}/{op}" for name in ("27b-fp32", "27b-n8") for op in BOUNDARY_FIRST]
    bench = [f"bench/{name}/{op}" for name in ("3b", "27b-n2", "v4-flash", "v4") for op in BOUNDARY_FIRST]
    return [*first, "step/27b", *repeats, "gradient/3b", *correct, "step/3b", *bench]


def run(key: str, rounds: int, report: dict[str, Any]) -> Any:
    """Measure one part of the report, and return its result as a JSON value.

    Args:
      key: name of the part, as `plan` gives it.
      rounds: number of times that each time is measured.
      report: the report so far.  The first `bench` part adds `copy_bytes_per_s`, the bytes that a copy moves in a second.
    """
    task, name, op = (*key.split("/"), "")[:3]
    if task == "step":
        return step_times.step_times(step_times.LAYERS[name], rounds)
    if task == "gradient":
        shape = step_times.LAYERS[name]
        return {
            who: step_times.repeated_gradient(shape, contestant, REPEATS)
            for who, contestant in step_times.CONTESTANTS.items()
            if contestant.kind == "mhc" and contestant.obstacle(shape) is None
        }
    spec, implementations = SPECS[name], measure.implementations(op)
    if task == "repeat":
        able = [one.name for one in implementations if one.obstacle(op, spec) is None]
        return {who: step_times.repeated_operation(op, spec, who, REPEATS) for who in able}
    if task == "correct":
        rows = []
        for implementation in implementations:
            status, gate = measure.attempt(op, spec, implementation)
            row = {"op": op, "spec": dataclasses.asdict(spec), "implementation": implementation.name, "status": status}
            rows.append({**row, **(dataclasses.asdict(gate) if gate else {})})
        return rows
    if "copy_bytes_per_s" not in report:
        report["copy_bytes_per_s"] = measure.copy_bandwidth(rounds)
    passed = [row for row in report["parts"].get(f"correct/{name}/{op}", []) if "errors" in row]
    known = {row["implementation"]: measure.Gate(row["errors"], row["allowed"]) for row in passed}
    return list(measure.measure(op, spec, implementations, rounds, report["copy_bytes_per_s"], known=known))


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json and README.md.  report.json is replaced at once, so that a kill leaves the whole old or new file."""
    (folder / "report.tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(folder / "report.tmp", folder / "report.json")
    (folder / "README.md").write_text(readme(report))


# -- README.md


def readme(report: dict[str, Any]) -> str:
    """Return the text of README.md, which describes the parts of the report that have been measured."""
    env, parts = report["env"], report["parts"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    out = [
        f"# {env['device']}",
        f"`{env['command']}`, {env['date']}, commit {env['commit']}{' and changes' if env['dirty'] else ''}",
        f"Python {env['python']}, {packages}. Written by `experiments/device_report.py`; figures in `report.json`.",
    ]
    if report["left"]:
        out += [f"Not done within the budget: {', '.join(report['left'])}. The same command goes on."]
    correct, bench, steps = (
        [v for k, v in parts.items() if k.startswith(f"{task}/")] for task in ("correct", "bench", "step")
    )
    if correct:
        out += _correctness([row for rows in correct for row in rows])
    if bench:
        out += [f"## Operations\n\nCopy (x + 1): {report['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written."]
        out += [measure.table([row for rows in bench for row in rows])]
    for part in steps:
        out += _steps(part)
    repeated = {key: value for key, value in parts.items() if key.startswith(("repeat/", "gradient/"))}
    if repeated:
        out += _repeats(repeated)
    return "\n\n".join(out) + "\n"


def _correctness(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| op | workload | implementation | | largest error |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        worst = measure.Gate(row["errors"], row["allowed"]).worst if "errors" in row else None
        error = f"{row['errors'][worst]:.1e} ({worst}, {row['allowed'][worst]:.0e})" if worst else ""
        head = f"{row['op']} | {measure.ArgSpec(**row['spec'])} | {row['implementation']} | {row['status']}"
        lines.append(f"| {head} | {error} |")
    explained = "Largest error of results and gradients, relative to the largest entry (bound)."
    return ["## Against float64", explained, "\n".join(lines)]


def _steps(part: Mapping[str, Any]) -> list[str]:
    shape = step_times.LayerShape(**part["shape"])
    layers = f"{shape.num_layers} layers of {shape.name} (width {shape.width}, SwiGLU {shape.mlp_width}, {shape.dtype})"
    plain = "Attention is plain XLA, which writes its scores to memory: with a fused one the same addition is a larger share."
    attention = plain if part["attention"] == "xla" else "Attention is cuDNN's."
    lines = [
        "| connection | step (ms) | over residual | adds (ns a sub-layer and token) | compiled memory (GiB) "
        "| loss of step 2 (nats/token) |",
        "| --- " * 6 + "|",
    ]
    for row in part["steps"]:
        cells = f"{row['status']} | | | |"
        if row["status"] == "ok":
            added = f"{100 * row['overhead']:+.1f} % | {1e3 * row['us_per_sublayer_token']:.2f}"
            cells = f"{row['ms']:.2f} | {added} | {row['memory_bytes'] / 2**30:.1f} | {row['loss']:.4f}"
        lines.append(f"| {row['name']} | {cells} |")
    title = f"## Train step: {layers}, {part['batch_size']} x {shape.sequence_length} tokens"
    return [title, attention, "\n".join(lines)]


def _repeats(parts: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    lines = [f"| part | contestant | differs in {REPEATS} calls |", "| --- | --- | --- |"]
    for key, contestants in parts.items():
        for who, names in contestants.items():
            lines.append(f"| {key} | {who} | {', '.join(names) or 'nothing, bit for bit'} |")
    return ["## Repeated calls", "\n".join(lines)]
