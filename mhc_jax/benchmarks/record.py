"""The record that `experiments/device_report.py` writes: its parts, one after another, and report.json and README.md of them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from mhc_kernels import measure
from mhc_kernels.ops.arg_specs import OPS, SPECS

from mhc_jax.benchmarks import steps

REPEATS = 20


def plan(tiny: bool) -> list[str]:
    """Parts in order of importance: `<what>/<workload>[/<operation>]`."""
    boundary_first = ("write_read", "write", "read", "coefficients", "sinkhorn")
    if tiny:
        ops = [f"{what}/tiny/{op}" for what in ("correct", "bench") for op in boundary_first]
        return [*ops, "step/tiny", "repeat/tiny/write_read", "gradient/tiny", "correct/tiny-bf16/write_read"]
    first = [f"{what}/27b/{op}" for what in ("correct", "bench") for op in boundary_first]
    repeats = [f"repeat/27b/{op}" for op in OPS]
    correct = [f"correct/{name}/{op}" for name in ("27b-fp32", "27b-n8") for op in boundary_first]
    bench = [f"bench/{name}/{op}" for name in ("3b", "27b-n2", "v4-flash", "v4") for op in boundary_first]
    return [*first, "step/27b", *repeats, "gradient/3b", *correct, "step/3b", *bench]


def run(key: str, rounds: int, report: dict[str, Any]) -> Any:
    """JSON value of one part."""
    what, name, op = (*key.split("/"), "")[:3]
    if what == "step":
        return steps.step_times(steps.LAYERS[name], rounds)
    if what == "gradient":
        shape = steps.LAYERS[name]
        able = {who: one for who, one in steps.contestants().items() if steps.obstacle(shape, *one) is None}
        return {who: steps.repeated_gradient(shape, *one, REPEATS) for who, one in able.items() if one[0] == "mhc"}
    spec, implementations = SPECS[name], measure.implementations(op)
    if what == "repeat":
        able = [one.name for one in implementations if one.obstacle(op, spec) is None]
        return {one: steps.repeated_operation(op, spec, one, REPEATS) for one in able}
    if what == "correct":
        rows = []
        for one in implementations:
            status, gate = measure.attempt(op, spec, one)
            row = {"op": op, "spec": dataclasses.asdict(spec), "implementation": one.name, "status": status}
            rows.append({**row, **(dataclasses.asdict(gate) if gate else {})})
        return rows
    if "copy_bytes_per_s" not in report:
        report["copy_bytes_per_s"] = measure.copy_bandwidth(rounds)
    passed = [row for row in report["parts"].get(f"correct/{name}/{op}", []) if "errors" in row]
    known = {row["implementation"]: measure.Gate(row["errors"], row["allowed"]) for row in passed}
    return list(measure.measure(op, spec, implementations, rounds, report["copy_bytes_per_s"], known=known))


def percent(row: dict[str, Any]) -> str:
    """Overhead of a step, and the time it adds."""
    return (
        f"{100 * row['overhead']:+.1f} % | {1e3 * row['us_per_sublayer_token']:.2f} | {row['memory_bytes'] / 2**30:.1f}"
    )


def readme(report: dict[str, Any]) -> str:
    """Markdown of what is there."""
    env, done = report["env"], report["parts"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    out = [
        f"# {env['device']}",
        f"`{env['command']}`, {env['date']}, commit {env['commit']}{' and changes' if env['dirty'] else ''}",
    ]
    out += [f"Python {env['python']}, {packages}. Written by `experiments/device_report.py`; figures in `report.json`."]
    if report["left"]:
        out += [f"Not done within the budget: {', '.join(report['left'])}. The same command goes on."]
    chosen = {kind: [v for k, v in done.items() if k.startswith(f"{kind}/")] for kind in ("correct", "bench", "step")}
    if chosen["correct"]:
        out += ["## Against float64", "Largest error of results and gradients, relative to the largest entry (bound)."]
        lines = ["| op | workload | implementation | | largest error |", "| --- | --- | --- | --- | --- |"]
        for row in (row for rows in chosen["correct"] for row in rows):
            worst = measure.Gate(row["errors"], row["allowed"]).worst if "errors" in row else None
            error = f"{row['errors'][worst]:.1e} ({worst}, {row['allowed'][worst]:.0e})" if worst else ""
            head = f"{row['op']} | {measure.ArgSpec(**row['spec'])} | {row['implementation']} | {row['status']}"
            lines.append(f"| {head} | {error} |")
        out.append("\n".join(lines))
    if chosen["bench"]:
        out += [f"## Operations\n\nCopy (x + 1): {report['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written."]
        out.append(measure.table([row for rows in chosen["bench"] for row in rows]))
    for part in chosen["step"]:
        shape = steps.LayerShape(**part["shape"])
        title = (
            f"{shape.num_layers} layers of {shape.name} (width {shape.width}, SwiGLU {shape.mlp_width}, {shape.dtype})"
        )
        out += [f"## Train step: {title}, {part['batch_size']} x {shape.sequence_length} tokens"]
        if part["attention"] == "xla":
            out += [
                "Attention is plain XLA, which writes its scores to memory: with a fused one the same addition is a larger share."
            ]
        else:
            out += ["Attention is cuDNN's."]
        lines = [
            "| connection | step (ms) | over residual | adds (ns a sub-layer and token) | compiled memory (GiB) "
            "| loss of step 2 (nats/token) |",
            "| --- " * 6 + "|",
        ]
        for row in part["steps"]:
            rest = (
                f"{row['ms']:.2f} | {percent(row)} | {row['loss']:.4f}"
                if row["status"] == "ok"
                else f"{row['status']} | | | |"
            )
            lines.append(f"| {row['name']} | {rest} |")
        out.append("\n".join(lines))
    again = {k: v for k, v in done.items() if k.startswith(("repeat/", "gradient/"))}
    if again:
        lines = [f"| part | contestant | differs in {REPEATS} calls |", "| --- | --- | --- |"]
        for key, found in again.items():
            lines += [
                f"| {key} | {who} | {', '.join(names) or 'nothing, bit for bit'} |" for who, names in found.items()
            ]
        out += ["## Repeated calls", "\n".join(lines)]
    return "\n\n".join(out) + "\n"


def write(folder: Path, report: dict[str, Any]) -> None:
    """report.json, so that a kill leaves a whole file, and README.md."""
    (folder / "report.tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(folder / "report.tmp", folder / "report.json")
    (folder / "README.md").write_text(readme(report))
