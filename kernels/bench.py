"""Benchmark mhc_kernels: every operation, implementation and workload, forward and forward + backward.

    python kernels/bench.py [--specs=27b,27b-n2] [--ops=read,write] [--implementations=xla,pallas_gpu]
                            [--rounds=10] [--json=FILE]
    python kernels/bench.py --compile [--specs=27b]   # the GPU kernels compiled for sm_90 on any machine: registers, bytes

A row is timed after its results and gradients have been compared with float64 on this device.  A row that is `FAILED` has no time.
GB is the least traffic of the operation: each pass reads every input once and writes every output once.  `of copy` is the speed of
this traffic over the speed of x + 1 on a large array in the same run.  Implementations alternate in one run.  Times are medians
over rounds of batches of calls, on inputs that rotate over at least 256 MiB.  A call under about 5 us is bounded by its launch.

`--implementations` takes xla, the other backends, and the peers torch.compile, liger, transformer_engine and tile_kernels.  A
peer runs if it is installed; XLA_PYTHON_CLIENT_PREALLOCATE=false leaves memory for peers.  Without `--specs` a CPU prints only the
first table, Sinkhorn beside its textbook form.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from mhc_kernels import gpu_inspect, sinkhorn
from mhc_kernels.backend_choice import IMPLEMENTATIONS
from mhc_kernels.measure import Batch, alternating, copy_bandwidth, implementations, markdown, measure, table
from mhc_kernels.ops.arg_specs import OPS, SPECS, ArgSpec, function, program, shapes
from mhc_kernels.ops.sinkhorn import reference
from peers import PEERS, PRECISION

DEFAULT_SPECS = ("3b", "27b", "27b-n2", "27b-n8", "27b-ragged", "v4-flash", "v4")
PACKAGES = ("jax", "jaxlib", "torch", "triton", "liger-kernel", "transformer-engine", "tile-kernels")


def textbook_rows(n: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Time our Sinkhorn on `tokens` n x n matrices beside the textbook form: mHC Eq. 9 with the matrices on the last axes."""
    logits = jax.random.normal(jax.random.key(0), (n, n, tokens))
    weights = jax.random.normal(jax.random.key(1), logits.shape)
    last, weights_last = jnp.moveaxis(logits, -1, 0), jnp.moveaxis(weights, -1, 0)
    programs = {
        "forward": (lambda x, _: sinkhorn(x), lambda x, _: reference.sinkhorn(x, axes=(-2, -1))),
        "forward + backward": (
            jax.value_and_grad(lambda x, w: (sinkhorn(x) * w).sum()),
            jax.value_and_grad(lambda x, w: (reference.sinkhorn(x, axes=(-2, -1)) * w).sum()),
        ),
    }
    rows = []
    for name, (ours, theirs) in programs.items():
        ours, theirs = jax.jit(ours), jax.jit(theirs)
        a, b = ours(logits, weights), theirs(last, weights_last)
        a, b = jax.tree.leaves(a)[-1], jnp.moveaxis(jax.tree.leaves(b)[-1], 0, -1)
        error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        assert error < 1e-5, f"sinkhorn {name} differs from the textbook by {error:.1e}"
        batches = {
            "ours": Batch(lambda k, f=ours: f(logits, weights)),
            "textbook": Batch(lambda k, f=theirs: f(last, weights_last)),
        }
        seconds = {who: statistics.median(times) for who, times in alternating(batches, rounds).items()}
        rows.append(
            {
                "pass": name,
                "n": n,
                "tokens": tokens,
                "ours_ms": 1e3 * seconds["ours"],
                "textbook_ms": 1e3 * seconds["textbook"],
                "ratio": seconds["textbook"] / seconds["ours"],
                "largest_relative_error": error,
            }
        )
    return rows


def textbook_table(rows: list[dict[str, Any]]) -> str:
    """Format `textbook_rows` as a Markdown table."""
    lines = []
    for r in rows:
        times = f"{r['ours_ms']:.2f}", f"{r['textbook_ms']:.2f}", f"{r['ratio']:.1f}"
        lines.append(["sinkhorn", r["pass"], r["n"], r["tokens"], *times])
    return markdown("op | pass | n | tokens | ours (ms) | textbook (ms) | ratio", lines)


def compiled_rows(op: str, spec: ArgSpec) -> list[dict[str, Any]]:
    """Compile the kernels of an operation and its gradient for sm_90, and return a row for each kernel.

    A row has the resources of the kernel.  A kernel must move its operands and results once, which is `moved` in bytes.
    """
    lowered = gpu_inspect.lower(program(function(op, spec, "pallas_gpu"), True), *shapes(op, spec))
    rows = []
    for kernel in gpu_inspect.resources(lowered):
        row = {"op": op, "spec": dataclasses.asdict(spec), "elements": spec.tokens * spec.width}
        rows.append(row | dataclasses.asdict(kernel))
    return rows


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Format `compiled_rows` as a Markdown table."""
    header = (
        "op | workload | kernel | registers | spills | loads | stores | shared (KiB) | must move (MB) | in C a token"
    )
    lines = []
    for r in rows:
        spec = ArgSpec(**r["spec"])
        widths = [", ".join(f"{n} x {bits} bit" for bits, n in sorted(r[side].items())) for side in ("loads", "stores")]
        C = r["moved"] / (r["elements"] * jnp.dtype(spec.dtype).itemsize)
        moved = f"{r['shared'] / 1024:.0f}", f"{r['moved'] / 1e6:.1f}", f"{C:.2f}"
        lines.append([r["op"], spec, r["name"], r["registers"], r["spills"], *widths, *moved])
    return markdown(header, lines)


def versions() -> dict[str, str]:
    """Return the versions of those packages in `PACKAGES` that are installed."""
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` if tracked files differ from it, or None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write(file: str, record: dict[str, Any]) -> None:
    """Write the record as JSON to `file`; an empty name writes nothing."""
    if file:
        Path(file).write_text(json.dumps(record, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*IMPLEMENTATIONS, *PEERS]

    def choices(flag: str, allowed: Any, default: str) -> None:
        def read(text: str) -> list[str]:
            chosen = [word for word in text.split(",") if word]
            for word in chosen:
                if word not in allowed:
                    raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(allowed)}")
            return chosen

        parser.add_argument(flag, type=read, default=read(default), metavar="A,B", help=f"among {', '.join(allowed)}")

    choices("--ops", OPS, ",".join(OPS))
    choices("--specs", list(SPECS), "" if jax.default_backend() == "cpu" else ",".join(DEFAULT_SPECS))
    choices("--implementations", names, ",".join(names))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the textbook table; 0 leaves it out")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument(
        "--compile", action="store_true", help="compile the GPU kernels instead; needs the package triton"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print Markdown tables, and return the exit status: 1 if a gate failed, 2 if `--compile` cannot run, else 0."""
    args = parse(argv)
    device = jax.devices()[0]
    record: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "versions": versions()}
    record |= {"commit": commit(), "rounds": args.rounds, "sinkhorn_textbook": [], "rows": []}
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), {args.rounds} rounds")
    if args.compile:
        if gpu_inspect.missing() is not None:
            print(f"--compile: {gpu_inspect.missing()}; make test-aot brings it to .venv/aot, for PYTHONPATH.")
            return 2
        chosen = [(op, SPECS[name]) for name in args.specs or ["27b"] for op in args.ops]
        record["compiled"] = [row for op, spec in chosen for row in compiled_rows(op, spec)]
        print(f"compiled for sm_90 by triton {versions()['triton']}\n\n{compiled_table(record['compiled'])}")
        write(args.json, record)
        return 0
    if args.tokens:
        record["sinkhorn_textbook"] = [r for n in (2, 4, 8) for r in textbook_rows(n, args.tokens, args.rounds)]
        print(f"\n{textbook_table(record['sinkhorn_textbook'])}")
    if args.specs:
        record["copy_bytes_per_s"] = copy_bandwidth(args.rounds)
        print(f"\ncopy: {record['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written\n")
    for name in args.specs:
        for op in args.ops:
            contestants = [*implementations(op), *PEERS.values()]
            chosen = [c for c in contestants if c.name in args.implementations]
            copy, loosest = record["copy_bytes_per_s"], dict.fromkeys(PEERS, PRECISION)
            rows = list(measure(op, SPECS[name], chosen, args.rounds, copy, loosest))
            lines = table(rows).splitlines()
            print("\n".join(lines[2:] if record["rows"] else lines), flush=True)
            record["rows"] += rows
            write(args.json, record)
    write(args.json, record)
    return 1 if any(row["status"] == "FAILED" for row in record["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
