"""Time the operations of mhc_kernels against their textbook forms, alternating in one run.

    python kernels/bench.py [--repeats=15] [--json=FILE]

Every row is checked for equality first.  Times are medians; the ratio is of medians of the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax
from mhc_kernels import sinkhorn


def textbook(logits, t_max: int = 20):
    """mHC Eq. 9 as it is written, on [N, n, n]."""
    M = jnp.exp(logits - logits.max((-1, -2), keepdims=True))

    def step(M, _):
        M = M / M.sum(-2, keepdims=True)
        return M / M.sum(-1, keepdims=True), None

    return lax.scan(step, M, None, length=t_max)[0]


def alternating(functions: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds; every round runs all of them, in turning order.

    Each timed call follows an untimed one of the same function: the first call after another function's pays for the
    caches and pages which that one left behind (here up to 4 ms, whoever comes second).
    """
    times = {name: [] for name in functions}
    for k in range(repeats):
        names = list(functions) if k % 2 else list(functions)[::-1]
        for name in names:
            jax.block_until_ready(functions[name]())
            began = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def sinkhorn_rows(n: int, tokens: int, repeats: int) -> list[dict]:
    """Forward, and forward with gradient, of `tokens` n x n matrices."""
    logits = jax.random.normal(jax.random.key(0), (n, n, tokens))
    weights = jax.random.normal(jax.random.key(1), logits.shape)
    last, weights_last = jnp.moveaxis(logits, -1, 0), jnp.moveaxis(weights, -1, 0)
    programs = {
        "forward": (lambda x, _: sinkhorn(x), lambda x, _: textbook(x)),
        "forward + backward": (
            jax.value_and_grad(lambda x, w: (sinkhorn(x) * w).sum()),
            jax.value_and_grad(lambda x, w: (textbook(x) * w).sum()),
        ),
    }
    rows = []
    for name, (ours, theirs) in programs.items():
        ours, theirs = jax.jit(ours), jax.jit(theirs)
        a, b = ours(logits, weights), theirs(last, weights_last)
        a, b = jax.tree.leaves(a)[-1], jnp.moveaxis(jax.tree.leaves(b)[-1], 0, -1)
        error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        assert error < 1e-5, f"sinkhorn {name} differs from the textbook by {error:.1e}"
        seconds = alternating(
            {"ours": lambda f=ours: f(logits, weights), "textbook": lambda f=theirs: f(last, weights_last)}, repeats
        )
        rows.append(
            {
                "op": "sinkhorn",
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


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    rows = [row for n in (2, 4, 8) for row in sinkhorn_rows(n, args.tokens, args.repeats)]
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform})\n")
    print("| op | pass | n | tokens | ours (ms) | textbook (ms) | ratio |\n| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['op']} | {r['pass']} | {r['n']} | {r['tokens']} | {r['ours_ms']:.2f} | {r['textbook_ms']:.2f} | "
            f"{r['ratio']:.1f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"jax": jax.__version__, "device": device.device_kind, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
