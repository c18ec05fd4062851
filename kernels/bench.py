"""Benchmark mhc_kernels: every operation, implementation and workload, forward and forward + backward.

    python kernels/bench.py [--specs=27b,27b-n2] [--ops=read,write] [--implementations=xla,pallas_gpu]
                            [--rounds=10] [--json=FILE]
    python kernels/bench.py --compile [--specs=27b]   # compile the GPU kernels for sm_90, on any machine; print registers, bytes

Before an implementation is timed, its results and gradients on this device are compared with a float64 reference.  If they do not
agree, its row says `FAILED` and has no time.  The implementations take turns in one run.  A time is the median over rounds.  Each
round times a batch of calls, whose inputs rotate over at least 256 MiB.  Calls under about 5 us are bounded by their launch.

The column `GB` is the least memory traffic of the operation: each pass reads every input once and writes every output once.  The
column `of copy` is the speed of this traffic divided by the speed at which x + 1 reads and writes a large array in the same run.

`--implementations` takes xla, the backends with kernels (pallas_tpu, pallas_gpu, triton), and the peers, which are kernels of other
projects: torch.compile, liger, transformer_engine and tile_kernels.  A peer runs if its package is installed.  The environment
variable XLA_PYTHON_CLIENT_PREALLOCATE=false leaves device memory for peers.  On a CPU without `--specs`, only the first table is
printed, which compares our Sinkhorn with its textbook form.
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
    """Time our Sinkhorn and the textbook form (mHC Eq. 9 with the matrices on the last axes) on `tokens` n x n matrices.

    Return a row of times for the forward pass and a row for forward + backward.
    """
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
    """Format the rows of `textbook_rows` as a Markdown table."""
    lines = []
    for r in rows:
        times = f"{r['ours_ms']:.2f}", f"{r['textbook_ms']:.2f}", f"{r['ratio']:.1f}"
        lines.append(["sinkhorn", r["pass"], r["n"], r["tokens"], *times])
    return markdown("op | pass | n | tokens | ours (ms) | textbook (ms) | ratio", lines)


def compiled_rows(op: str, spec: ArgSpec) -> list[dict[str, Any]]:
    """Compile the kernels of an operation and its gradient for sm_90, and return a row for each kernel.

    A row has the operation, the workload and the resources of the kernel (`gpu_inspect.Resources`).
    """
    lowered = gpu_inspect.lower(program(function(op, spec, "pallas_gpu"), True), *shapes(op, spec))
    rows = []
    for kernel in gpu_inspect.resources(lowered):
        row = {"op": op, "spec": dataclasses.asdict(spec), "elements": spec.tokens * spec.width}
        rows.append(row | dataclasses.asdict(kernel))
    return rows


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows of `compiled_rows` as a Markdown table."""
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
    """Return the version of each package in `PACKAGES` that is installed, by package name."""
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def commit() -> str | None:
    """Return the hash of the git commit, followed by `-dirty` if tracked files differ from it, or None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write(file: str, record: dict[str, Any]) -> None:
    """Write the results of a benchmark, `record`, as JSON to `file`.  If `file` is empty, write nothing."""
    if file:
        Path(file).write_text(json.dumps(record, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options `argv`, or those of the command line if `argv` is None."""
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
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the options `argv` ask for, and print its results as Markdown tables.

    Returns:
      Exit status: 1 if results of an implementation did not agree with float64, 2 if `--compile` cannot run here, else 0.
    """
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
