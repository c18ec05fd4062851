"""Checkpoints side by side: scores, bits per byte of gold answers, and paired differences over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
CHUNK = 200
"""Resamples at a time: 14,042 items x 200 take 22 MB."""


def bootstrap(values: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """95 % percentile interval of sum(values) / sum(weights) over resampled items, the same at every call.

    Pairing is the caller's: `values` are differences of the same items.
    """
    random, N = np.random.default_rng(0), len(values)
    ratios = []
    for _ in range(RESAMPLES // CHUNK):
        drawn = random.integers(0, N, (CHUNK, N))
        ratios.append(values[drawn].sum(1) / weights[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def paired_differences(
    one: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], benchmark: str
) -> dict[str, Any]:
    """`one` minus `baseline` over the items that both have: score and gold bits per byte, with 95 % intervals.

    Bits are per byte of the gold text, which is the same for both, so tokenizers may differ.
    """
    base = {(s["task"], s["doc_id"]): s for s in baseline if s["benchmark"] == benchmark}
    pairs = [
        (s, base[s["task"], s["doc_id"]])
        for s in one
        if s["benchmark"] == benchmark and (s["task"], s["doc_id"]) in base
    ]
    out: dict[str, Any] = {"items": len(pairs)}
    if not pairs:
        return out
    scores = np.asarray([a["score"] - b["score"] for a, b in pairs])
    out["score"], out["score_interval"] = float(scores.mean()), bootstrap(scores, np.ones(len(pairs)))
    bits = [(a, b) for a, b in pairs if a["gold_bits"] is not None and b["gold_bits"] is not None]
    if bits:
        d = np.asarray([a["gold_bits"] - b["gold_bits"] for a, b in bits])
        size = np.asarray([a["gold_bytes"] for a, _ in bits], float)
        out["bits"], out["bits_interval"] = float(d.sum() / size.sum()), bootstrap(d, size)
    return out


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a benchmark and checkpoint, with paired differences to the first checkpoint."""
    head = [
        "benchmark",
        "checkpoint",
        "metric",
        "shots",
        "items",
        "cut",
        "score",
        "difference",
        "gold bits/byte",
        "difference",
    ]
    rows = [head, ["---"] * 4 + ["---:"] * 6]
    for name in results[0]["benchmarks"]:
        for result in results:
            own = result["benchmarks"][name]
            d = {} if result is results[0] else paired_differences(result["samples"], results[0]["samples"], name)
            paper = "" if own["shots"] == own["paper_shots"] else f" (paper: {own['paper_shots']})"
            error = "" if own["stderr"] is None else f" ± {100 * own['stderr']:.1f}"
            bits = own["gold_bits_per_byte"]
            rows.append(
                [
                    name,
                    result["checkpoint"],
                    own["metric"],
                    f"{own['shots']}{paper}",
                    str(own["items"]),
                    str(own["truncated"]),
                    f"{100 * own['score']:.1f}{error}",
                    _interval(d.get("score"), d.get("score_interval"), 100.0, "{:+.1f}"),
                    "" if bits is None else f"{bits:.3f}",
                    _interval(d.get("bits"), d.get("bits_interval"), 1.0, "{:+.3f}"),
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Sentences on what the numbers of a checkpoint are not."""
    context, out = result["settings"]["context"], []
    cut = {name: (b["truncated"], b["items"]) for name, b in result["benchmarks"].items() if b["truncated"]}
    if cut:
        listed = ", ".join(f"{name} {k} of {n}" for name, (k, n) in cut.items())
        out.append(
            f"{result['checkpoint']}: prompts that lost their beginning to a context of {context} tokens: {listed}."
        )
    out.append(
        f"{result['checkpoint']}: {result['wall_clock_s']:.0f} s, {result['compilations']} programs compiled; {result['folder']}."
    )
    return out


def _interval(value: float | None, interval: tuple[float, float] | None, factor: float, form: str) -> str:
    if value is None or interval is None:
        return ""
    low, high = (form.format(factor * end) for end in interval)
    text = f"{form.format(factor * value)} [{low}, {high}]"
    return f"**{text}**" if interval[0] > 0 or interval[1] < 0 else text
