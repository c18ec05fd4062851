"""The report that `experiments/device_report.py` writes: what is measured, in which order, and the files report.json and README.md.

A part of the report is one task at one workload (a size of the arguments or layers).  The tasks are:

    correct   compare results and gradients of one operation with those in float64
    bench     time one operation, with peers of other projects where they are installed
    step      time train steps
    peer      compare PyTorch's train step with ours at a tiny size, then time it at the size of the workload
    train     train a model for two minutes, and read its gains
    repeat    call one operation again and again, and compare the bits of its results and gradients
    gradient  compute the gradient of a model again and again, and compare its bits
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhc_kernels import measure
from mhc_kernels.ops.arg_specs import OPS, SPECS, ArgSpec

from mhc_jax.files.json_files import replacing
from mhc_jax.timing import step_times

REPEATS = 20
BOUNDARY_FIRST = ("write_read", "write", "read", "coefficients", "sinkhorn")
SECONDS = {"correct": 15, "bench": 30, "step": 100, "peer": 110, "train": 150, "repeat": 15, "gradient": 40}
"""Estimated seconds of a part by task, on a GPU.  A part begins only if the budget has as many seconds left."""
OWN_PROCESS = ("step", "peer", "train")
"""Tasks whose parts have a process of their own, because each needs the whole memory of the device."""


def plan(tiny: bool) -> list[str]:
    """Return the names of the parts of the report, `<task>/<workload>[/<operation>]`, the most valuable for their time first.

    Args:
      tiny: whether to choose small workloads, which a CPU can run.
    """
    if tiny:
        ops = [f"{task}/tiny/{op}" for task in ("correct", "bench") for op in BOUNDARY_FIRST]
        rest = ["step/tiny", "peer/tiny", "train/tiny", "repeat/tiny/write_read", "gradient/tiny"]
        return [*ops, *rest, "correct/tiny-bf16/write_read"]
    first, *others = [[f"{task}/27b/{op}" for task in ("correct", "bench")] for op in BOUNDARY_FIRST]
    two_streams = [f"correct/27b-n2/{op}" for op in BOUNDARY_FIRST]
    repeats = [f"repeat/27b/{op}" for op in OPS]
    bench = [f"bench/{name}/{op}" for name in ("3b", "27b-n2") for op in BOUNDARY_FIRST]
    correct = [f"correct/{name}/{op}" for name in ("27b-fp32", "27b-n8") for op in BOUNDARY_FIRST]
    larger = [f"bench/{name}/{op}" for name in ("v4-flash", "v4") for op in BOUNDARY_FIRST]
    whole = ["step/27b", "step/304m", "peer/304m"]
    second = [*(key for pair in others for key in pair), "repeat/27b-ragged/write_read", "train/one_gpu"]
    return [*first, *whole, *second, *two_streams, *repeats, *bench, "step/3b", "gradient/3b", *correct, *larger]


def seconds(key: str) -> int:
    """Return the estimated seconds of a part on a GPU."""
    return SECONDS[key.split("/")[0]]


def left(report: Mapping[str, Any]) -> list[str]:
    """Return the parts of the plan that are not done: first those that were not tried, then those with a failure or an error."""
    untried = [key for key in plan(report["tiny"]) if key not in report["parts"]]
    return untried + [key for key, part in report["parts"].items() if failure(part) is not None or has_errors(part)]


def failure(part: Any) -> str | None:
    """Return why a part failed as a whole, or None if it has a value."""
    return part.get("failed") if isinstance(part, dict) else None


def has_errors(part: Any) -> bool:
    """Return whether a contestant of a part ended in an error, after which the state of the device is not to be trusted."""
    rows = part.get("steps", []) if isinstance(part, dict) else part
    rows = rows if isinstance(rows, list) else []  # `steps` of a training run is a number
    return any(isinstance(row, dict) and str(row.get("status", "")).startswith("error") for row in rows)


def run(
    key: str,
    rounds: int,
    report: dict[str, Any],
    peers: Sequence[measure.Implementation] = (),
    peer_error: float = 0.0,
) -> Any:
    """Measure one part of the report, unless its task has a process of its own, and return its result as a JSON value.

    Args:
      key: name of the part, as `plan` gives it.
      rounds: number of times that each time is measured.
      report: the report so far.  The first `bench` part adds `copy_bytes_per_s`, the bytes that a copy moves in a second.
      peers: contestants of other projects that `bench` times too.
      peer_error: relative error that a peer may have.
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
    loosest = {peer.name: peer_error for peer in peers}
    contestants, copy = [*implementations, *peers], report["copy_bytes_per_s"]
    return list(measure.measure(op, spec, contestants, rounds, copy, loosest, known))


def wrong(report: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts in which an implementation failed its comparison or ended in an error."""
    parts = report["parts"].items()
    return [
        key
        for key, part in parts
        if has_errors(part) or (isinstance(part, list) and any(row["status"] == "FAILED" for row in part))
    ]


def write(folder: Path, report: dict[str, Any], predictions: Path) -> None:
    """Write report.json and README.md.  report.json is replaced at once, so that a kill leaves the whole old or new file.

    Args:
      folder: the folder of the report.
      report: the report.
      predictions: the folder with predictions.json, which README.md sets beside the measurements of an H100.
    """
    with replacing(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    file = predictions / "predictions.json"
    predicted = json.loads(file.read_text()) if file.exists() and "H100" in report["env"]["device"] else {}
    (folder / "README.md").write_text(readme(report, predicted))


# -- README.md


def readme(report: Mapping[str, Any], predicted: Mapping[str, Any] = {}) -> str:
    """Return the text of README.md, which describes the parts of the report that have been measured.

    Args:
      report: the report.
      predicted: what `predictions.predict` has returned; empty leaves out the columns of predictions.
    """
    env = report["env"]
    failed = {key: why for key, part in report["parts"].items() if (why := failure(part)) is not None}
    parts = {k: v for k, v in report["parts"].items() if k not in failed}
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    out = [
        f"# {env['device']}",
        f"`{env['command']}`, {env['date']}, commit {env['commit']}{' and changes' if env['dirty'] else ''}",
        f"Python {env['python']}, {packages}. Written by `experiments/device_report.py`; figures in `report.json`.",
    ]
    if untried := [key for key in report["left"] if key not in failed]:
        out += [f"Not done within the budget: {', '.join(untried)}. The same command goes on."]
    of = {task: [v for k, v in parts.items() if k.startswith(f"{task}/")] for task in SECONDS}
    if of["bench"]:
        rows = [row for rows in of["bench"] for row in rows]
        out += [f"## Operations\n\nCopy (x + 1): {report['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written."]
        out += [measure.table(rows), *_predicted_operations(rows, predicted)]
    for part in of["step"]:
        out += _steps(part, predicted.get("steps", {}).get(part["shape"]["name"], []))
    for part in of["peer"]:
        out += _peers(part)
    for key in parts:
        if key.startswith("train/"):
            out += _trained(parts[key], step_times.TRAINED_TOKENS.get(key.split("/")[1]))
    if of["correct"]:
        out += _correctness([row for rows in of["correct"] for row in rows])
    repeated = {key: value for key, value in parts.items() if key.startswith(("repeat/", "gradient/"))}
    if repeated:
        out += _repeats(repeated)
    if predicted:
        rest = [[row[key] for key in ("part", "expected", "wrong", "why")] for row in predicted["others"]]
        out += ["## Predicted for the other parts", measure.markdown("part | expected | wrong | why", rest)]
    if failed:
        out += ["## Parts that failed", *(f"`{key}`:\n\n```\n{why}\n```" for key, why in failed.items())]
    return "\n\n".join(out) + "\n"


def _predicted_operations(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any]) -> list[str]:
    """Return the table of the times of `pallas_gpu` beside their predictions, or nothing if there is no prediction."""
    expected = {
        (row["op"], row["pass"], ArgSpec(**row["spec"])): row
        for version in predicted.get("operations", {}).values()
        for row in version
    }
    lines = []
    for row in rows:
        prediction = expected.get((row["op"], row["pass"], ArgSpec(**row["spec"])))
        if prediction and row["implementation"] == "pallas_gpu":
            verdict = "slower than expected" if row["ms"] > prediction["wrong_ms"] else ""
            figures = [f"{row['ms']:.3f}", f"{prediction['ms']:.3f}", f"{row['ms'] / prediction['ms']:.2f}", verdict]
            lines.append([row["op"], row["pass"], ArgSpec(**row["spec"]), *figures])
    header = "op | pass | workload | measured (ms) | predicted (ms) | measured over predicted | "
    return [measure.markdown(header, lines)] if lines else []


def _peers(part: Mapping[str, Any]) -> list[str]:
    shape = step_times.LayerShape(**part["shape"])
    errors = [
        [dtype, kind, f"{loss:.1e}", f"{gradient:.1e}"]
        for dtype, of_kinds in part["errors"].items()
        for kind, (loss, gradient) in of_kinds.items()
    ]
    out = [
        f"## Train step in PyTorch {part['torch']}: {shape.name}",
        "Against ours at a tiny size: relative error of the loss, and of the whole gradient in the Euclidean norm.",
        measure.markdown("dtype | connection | loss | gradient", errors),
    ]
    if not part["equal"]:
        out += [
            "They are NOT equal within the bounds of `torch_steps.BOUNDS`, so the times below are of another computation."
        ]
    lines = []
    for row in part["steps"]:
        timed = row["status"] == "ok"
        cells = [f"{row['ms']:.2f}", f"{1 / (1 + row['overhead']):.2f}"] if timed else [row["status"], ""]
        lines.append([row["name"], *cells])
    timed = f"{shape.batch_size} x {shape.sequence_length} tokens, {shape.dtype}; `torch.compile` compiles a block."
    return [*out, timed, measure.markdown("connection | step (ms) | throughput over residual's", lines)]


def _trained(part: Mapping[str, Any], tokens: int | None) -> list[str]:
    """Return the table of a training run; `tokens` is the number of tokens of a step, or None if it is not known."""
    keys = (
        "status",
        "steps",
        "parameters",
        "step_time_s",
        "train_loss",
        "max_composite_forward",
        "max_composite_backward",
    )
    lines = [[key, part.get(key)] for key in (*keys, "peak_memory_bytes", "compile_s", "wall_clock_s")]
    if tokens and part.get("step_time_s"):
        lines.append(["tokens per second", round(tokens / part["step_time_s"])])
    return ["## A short training of mHC", measure.markdown("summary | value", lines)]


def _correctness(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| op | workload | implementation | | largest error |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        worst = measure.Gate(row["errors"], row["allowed"]).worst if "errors" in row else None
        error = f"{row['errors'][worst]:.1e} ({worst}, {row['allowed'][worst]:.0e})" if worst else ""
        head = f"{row['op']} | {measure.ArgSpec(**row['spec'])} | {row['implementation']} | {row['status']}"
        lines.append(f"| {head} | {error} |")
    explained = "Largest error of results and gradients, relative to the largest entry (bound)."
    return ["## Against float64", explained, "\n".join(lines)]


def _steps(part: Mapping[str, Any], predicted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tables of a part `step`; `predicted` are the rows of `predictions.steps` for its shape."""
    shape = step_times.LayerShape(**part["shape"])
    layers = f"{shape.num_layers} layers of {shape.name} (width {shape.width}, SwiGLU {shape.mlp_width}, {shape.dtype})"
    plain = "Attention is plain XLA, which writes its scores to memory: with a fused one the same addition is a larger share."
    attention = plain if part["attention"] == "xla" else "Attention is cuDNN's."
    lines = [
        "| connection | step (ms) | over residual | adds (ns a sub-layer and token) | compiled memory (GiB) "
        "| loss of step 2 (nats/token) | predicted over residual |",
        "| --- " * 7 + "|",
    ]
    # Predictions are for the full batch and a fused attention.
    comparable = part["attention"] == "cudnn" and part["batch_size"] == shape.batch_size
    expected = {row["name"]: f"{100 * row['overhead']:+.0f} %" for row in predicted if comparable}
    for row in part["steps"]:
        cells = f"{row['status']} | | | | |"
        if row["status"] == "ok":
            added = f"{100 * row['overhead']:+.1f} % | {1e3 * row['us_per_sublayer_token']:.2f}"
            cells = f"{row['ms']:.2f} | {added} | {row['memory_bytes'] / 2**30:.1f} | {row['loss']:.4f}"
            cells += f" | {expected.get(row['name'], '')}"
        lines.append(f"| {row['name']} | {cells} |")
    title = f"## Train step: {layers}, {part['batch_size']} x {shape.sequence_length} tokens"
    return [title, attention, "\n".join(lines)]


def _repeats(parts: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    lines = [f"| part | contestant | differs in {REPEATS} calls |", "| --- | --- | --- |"]
    for key, contestants in parts.items():
        for who, names in contestants.items():
            lines.append(f"| {key} | {who} | {', '.join(names) or 'nothing, bit for bit'} |")
    return ["## Repeated calls", "\n".join(lines)]
