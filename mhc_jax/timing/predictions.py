"""What an H100 should measure, computed before one is at hand: times of operations and train steps, each with its reason.

A time is the largest of what memory, tensor cores and latency allow, by the constants below.  A measured time of more than twice
the predicted one means that something is wrong: with the kernel, or with the reason.

    operations   bytes that the compiled kernels must move, at `STREAMING` of the speed of a copy
    steps        FLOPs of the model, elements that the connection moves for each sub-layer and token, launches, Sinkhorn iterations
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from mhc_kernels import gpu_inspect, measure
from mhc_kernels.gpu import power_of_two
from mhc_kernels.ops.arg_specs import ArgSpec, floor_bytes, function, program, shapes

from mhc_jax.cost import counts
from mhc_jax.timing.step_times import BASELINE, CONTESTANTS, LayerShape, config_of

COPY = 3.0e12
"""Bytes per second that a copy reads and writes, as seen on an H100 with HBM3."""
STREAMING = 0.85
"""Share of `COPY` that kernels should reach.  Elementwise kernels of XLA reach 0.85 to 0.95."""
CACHE = 50e6
"""Bytes of the second-level cache."""
TENSOR = 400e12
"""FLOPs per second of the small bfloat16 products inside our kernels: 40 % of the peak of 989e12."""
MODEL = 450e12
"""FLOPs per second of a whole train step, without its connections: 45 % of the peak, which good training programs reach."""
LAUNCH = 3e-6
"""Seconds that one kernel takes at least, its launch included."""
PAIR = 0.3e-6
"""Seconds of one pair of Sinkhorn steps: two sums over lanes, two divisions, and what depends on them, some 500 cycles."""
OPTIMIZER_BYTES = 28
"""Bytes for each parameter that AdamW moves: it reads p, g, m and v, and writes p, m and v, all float32."""
WRONG = 2.0
"""Factor between a predicted time and the shortest time that says that something is wrong."""
PRODUCTS = {
    "mhc_coefficients_forward": 3,
    "mhc_coefficients_backward": 6,
    "mhc_coefficients_dphi": 3,
    "mhc_write_read_forward": 3,
    "mhc_write_read_backward": 3,
}
"""Number of bfloat16 products [N, nC] x [nC, K] in each kernel: phi and the gradient of z are cut into three pieces each."""


def sinkhorn_pairs(name: str, num_iters: int = 20, segment: int = 4) -> int:
    """Return the number of pairs of steps that a Sinkhorn kernel does, one after the other; its backward pass repeats segments."""
    if name == "mhc_sinkhorn_forward":
        return num_iters
    return 3 * num_iters + num_iters**2 // (2 * segment) if name == "mhc_sinkhorn_backward" else 0


def kernel_seconds(kernel: Mapping[str, Any], spec: ArgSpec) -> float:
    """Predict the seconds of one kernel of an operation on bfloat16 streams.

    Args:
      kernel: its `name` and the bytes of its operands and results, `moved`.
      spec: the workload.
    """
    n, N, C = spec.num_streams, spec.tokens, spec.width
    moved, K = kernel["moved"], max(power_of_two(n * n + 2 * n), 16)
    if kernel["name"] == "mhc_write_read_forward":
        # The second pass reads x' again.  All programs run at once, so the cache holds only a part of it.
        moved += max(0.0, 2 * N * n * C - CACHE)
    products = 2.0 * N * n * C * K * PRODUCTS.get(kernel["name"], 0)
    return LAUNCH + max(moved / (STREAMING * COPY), products / TENSOR, PAIR * sinkhorn_pairs(kernel["name"]))


def operation(op: str, spec: ArgSpec) -> list[dict[str, Any]]:
    """Predict the times of an operation by `pallas_gpu`, forward and forward + backward, from its kernels compiled for sm_90.

    Returns:
      rows with `op`, `spec`, `pass`, `kernels` (their fields, see `gpu_inspect.Resources`, and `programs`), `moved` (bytes), `ms`,
      `copy_share` (as `measure.measure` defines it) and `wrong_ms`.
    """
    rows = []
    for backward in (False, True):
        lowered = gpu_inspect.lower(program(function(op, spec, "pallas_gpu"), backward), *shapes(op, spec))
        kernels = [dataclasses.asdict(k) | {"programs": k.programs} for k in gpu_inspect.resources(lowered)]
        seconds = sum(kernel_seconds(kernel, spec) for kernel in kernels)
        rows.append(
            {
                "op": op,
                "spec": dataclasses.asdict(spec),
                "pass": "forward + backward" if backward else "forward",
                "kernels": kernels,
                "moved": sum(kernel["moved"] for kernel in kernels),
                "ms": 1e3 * seconds,
                "copy_share": floor_bytes(op, spec, backward) / seconds / COPY,
                "wrong_ms": WRONG * 1e3 * seconds,
            }
        )
    return rows


def elements(contestant: str, n: int) -> int:
    """Return the number of elements, in units of C, that a connection moves for each sub-layer and token, forward and backward.

    The operations of `xla` and of `hc` are kernels of their own: coefficients 3n, read 3n + 2, write 5n + 3, and 6n for the two
    sums of the gradients of x.  `identity` writes with H_res = I, which moves 3n + 3.  The fused boundary of `mhc` with
    `pallas_gpu` moves (2n + 2) + n again for x' forward and (5n + 4) backward.
    """
    kind, backend = re.split("[: ]", contestant)[0], contestant.rpartition(" ")[2]
    if (kind, backend) == ("mhc", "pallas_gpu"):
        return (3 * n + 2) + (5 * n + 4)
    return 15 * n + 5 if kind == "identity" else 17 * n + 5


def latency(contestant: str) -> float:
    """Return the seconds that launches and Sinkhorn iterations take for each sub-layer, forward and backward.

    The fused boundary of `mhc` takes 6 kernels, and any other connection about 12.
    """
    kind, backend = re.split("[: ]", contestant)[0], contestant.rpartition(" ")[2]
    pairs = sinkhorn_pairs("mhc_sinkhorn_forward") + sinkhorn_pairs("mhc_sinkhorn_backward") if kind == "mhc" else 0
    return (6 if (kind, backend) == ("mhc", "pallas_gpu") else 12) * LAUNCH + pairs * PAIR


def steps(shape: LayerShape, contestants: Iterable[str], num_streams: int = 4) -> list[dict[str, Any]]:
    """Predict the time of a train step of each contestant, and what it adds to the baseline.

    Returns:
      rows with `name`, `ms`, `overhead` (0.05: 5 % longer than the baseline) and `wrong_overhead`; the baseline's is None.
    """
    config = config_of(shape, BASELINE, shape.batch_size)
    tokens = shape.batch_size * shape.sequence_length
    cost = counts.model_cost(config.model, shape.sequence_length)
    base = cost.training_flops * tokens / MODEL + OPTIMIZER_BYTES * cost.total / (STREAMING * COPY)
    rows: list[dict[str, Any]] = [{"name": BASELINE, "ms": 1e3 * base, "overhead": 0.0, "wrong_overhead": None}]
    for name in contestants:
        # The residual connection itself reads x and y and writes x + y, forward and backward.
        moved = 2 * shape.width * (elements(name, num_streams) - 6) * tokens
        added = 2 * shape.num_layers * (moved / (STREAMING * COPY) + latency(name))
        rows.append(
            {
                "name": name,
                "ms": 1e3 * (base + added),
                "overhead": added / base,
                "wrong_overhead": WRONG * added / base,
            }
        )
    return rows


def others() -> list[dict[str, str]]:
    """Predict what the other tasks of the report show: rows with `part`, `expected`, `wrong` and `why`."""
    one_gpu = LayerShape("one_gpu", 768, 12, 2048, 1024, batch_size=64, num_layers=12, head_width=64, vocabulary=264)
    step_s = steps(one_gpu, ["mhc:init=paper pallas_gpu"])[1]["ms"] / 1e3
    tokens = one_gpu.batch_size * one_gpu.sequence_length / step_s
    n = 4  # elements of one pass over those of operations that are kernels of their own, forward, and forward + backward
    forward = STREAMING * (2 * n + 2) / (4 * n + 2)
    both = STREAMING * (5 * n + 5) / elements("mhc:init=paper xla", n)
    return [
        {
            "part": "correct",
            "expected": "every error within its bound",
            "wrong": "any FAILED",
            "why": "the same kernels agree with float64 in interpret mode on a CPU",
        },
        {
            "part": "bench, torch.compile, write_read",
            "expected": f"{forward:.0%} of copy forward, {both:.0%} forward + backward",
            "wrong": "above ours",
            "why": "write, coefficients and read are kernels of their own: (4n + 2)C forward and (17n + 5)C in both "
            "passes, where one pass over the streams moves (2n + 2)C and (5n + 5)C",
        },
        {
            "part": "peer, 304m",
            "expected": "residual as fast as ours within 15 %; mhc:init=paper at .53 of residual's throughput",
            "wrong": "residual beyond 25 %",
            "why": "the throughput that hyper-connection-factory reports for this model under torch.compile on H100s",
        },
        {
            "part": "train, one_gpu",
            "expected": f"{tokens / 1e3:.0f} thousand tokens/s; largest composite gain 1.0 forward, 1 to 2 backward",
            "wrong": f"{tokens / WRONG / 1e3:.0f} thousand tokens/s; a gain above 3",
            "why": "the step is predicted as above; 20 Sinkhorn iterations end on rows, whose sums are 1",
        },
        {
            "part": "repeat, gradient",
            "expected": "nothing differs in 20 calls, but for the gradient of the embedding",
            "wrong": "any other difference",
            "why": "no kernel of ours adds atomically, and partial sums are added in a fixed order; XLA scatters the embedding's "
            "gradient with atomic additions",
        },
    ]


# -- Markdown


def readme(predictions: Mapping[str, Any]) -> str:
    """Return the text of README.md of the predictions.

    Args:
      predictions: `operations` (rows of `operation` by version of Triton), `steps` (rows of `steps` by name of the shape),
        `others` (rows of `others`), `jax`.
    """
    out = [
        "# Predicted for an H100, not measured",
        "Made by `python experiments/device_report.py --predict` without a GPU; the figures are in `predictions.json`, and the "
        "formulas in `mhc_jax/timing/predictions.py`.",
        f"A copy moves {COPY / 1e12:.1f} TB/s, kernels reach {STREAMING:.0%} of it, products inside kernels run at "
        f"{TENSOR / 1e12:.0f} TFLOP/s and the model at {MODEL / 1e12:.0f} TFLOP/s. A kernel takes {1e6 * LAUNCH:.0f} us at least "
        f"and a pair of Sinkhorn steps {1e6 * PAIR:.1f} us. A time beyond the last column says that something is wrong.",
        f"## Kernels, compiled for sm_90 from what jax {predictions['jax']} lowers",
        _kernel_table(predictions["operations"]),
        "`programs` is the number of programs that fit on a multiprocessor at once. Spills count instructions and bytes of local "
        "memory.",
        "## Operations",
        _operation_table(next(iter(predictions["operations"].values()))),
        "## Train steps",
    ]
    rest = [[row[key] for key in ("part", "expected", "wrong", "why")] for row in predictions["others"]]
    tables = [
        _step_table(predictions["steps"]),
        "## Other parts",
        measure.markdown("part | expected | wrong | why", rest),
    ]
    return "\n\n".join([*out, *tables]) + "\n"


def _kernel_table(operations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines, seen = [], set()
    for triton, rows in operations.items():
        for row in rows:
            spec = ArgSpec(**row["spec"])
            for kernel in row["kernels"]:
                line = (spec, kernel["name"], triton)
                if line in seen:
                    continue
                seen.add(line)
                wide = kernel["loads"].get("128", 0), kernel["stores"].get("128", 0)
                numbers = [kernel[key] for key in ("registers", "spills", "programs", "warps")]
                shared = f"{kernel['shared'] / 1024:.0f}"
                lines.append([*line, *numbers, shared, *wide, f"{kernel['moved'] / 1e6:.0f}"])
    header = (
        "workload | kernel | Triton | registers | spills | programs | warps | shared (KiB) | 16-byte loads | 16-byte stores "
        "| must move (MB)"
    )
    return measure.markdown(header, sorted(lines, key=lambda line: tuple(map(str, line[:3]))))


def _operation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["op"],
            row["pass"],
            ArgSpec(**row["spec"]),
            f"{row['ms']:.3f}",
            f"{100 * row['copy_share']:.0f} %",
            f"{row['wrong_ms']:.3f}",
        ]
        for row in rows
    ]
    return measure.markdown("op | pass | workload | ms | of copy | wrong above (ms)", lines)


def _step_table(steps_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for shape, rows in steps_of.items():
        for row in rows:
            wrong = "" if row["wrong_overhead"] is None else f"{100 * row['wrong_overhead']:+.0f} %"
            speed = f"{1 / (1 + row['overhead']):.2f}"
            lines.append([shape, row["name"], f"{row['ms']:.1f}", f"{100 * row['overhead']:+.0f} %", speed, wrong])
    return measure.markdown(
        "shape | connection | step (ms) | over residual | throughput over residual's | wrong above", lines
    )


def predict(specs: Iterable[ArgSpec], ops: Iterable[str], shapes_of: Iterable[LayerShape]) -> dict[str, Any]:
    """Predict the times of operations on workloads and of train steps; needs the package triton, whose version is recorded."""
    import triton

    ops = list(ops)
    able = [
        name for name, contestant in CONTESTANTS.items() if contestant.implementation in (None, "xla", "pallas_gpu")
    ]
    return {
        "jax": jax.__version__,
        "operations": {triton.__version__: [row for spec in specs for op in ops for row in operation(op, spec)]},
        "others": others(),
        "steps": {
            shape.name: steps(
                shape, [name for name in able if name in (shape.contestants or able) and name != BASELINE]
            )
            for shape in shapes_of
        },
    }
