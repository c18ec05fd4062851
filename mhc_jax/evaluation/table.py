"""Checkpoints side by side: scores, bits per byte of gold answers, and paired differences over items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from mhc_jax.runs.trained import beyond_training

RESAMPLES = 2000
CHUNK = 200
"""Resamples at a time: 14,042 items x 200 take 22 MB a column."""
FEWEST_RESAMPLED = 2
"""Items below which there is no interval: every resample of one item is that item, so its interval would be a point."""
FEWEST_BOLD = 30
"""Items below which nothing is bold.

The percentile interval of a normal mean of N items covers it with probability P(|t| < 1.96 sqrt((N - 1) / N)), t of N - 1
degrees of freedom: 0.936 of 30 items, 0.846 of 5.
"""
LEGEND = (
    f"score: mean over items, ± its standard error. gold bits/byte: -log2 of the probability of the gold answers, over their "
    f"bytes. difference: to the first checkpoint over the same items, with a bootstrapped 95 % interval over items (none below "
    f"{FEWEST_RESAMPLED}). Bold: 0 lies outside the interval, which holds {FEWEST_BOLD} items or more, and both checkpoints read "
    "no further than they were trained, with every prompt whole."
)


def bootstrap(statistic: Callable[..., Any], *columns: Float[np.ndarray, " N"]) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic over resampled items, the same at every call; None below `FEWEST_RESAMPLED`.

    Args:
      statistic: of the columns, along `axis`.
      columns: values of the same items, which are drawn together.
    """
    if len(columns[0]) < FEWEST_RESAMPLED:
        return None
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=CHUNK,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def difference_of_ratios(
    one: Float[np.ndarray, "*draws N"],
    size: Float[np.ndarray, "*draws N"],
    base: Float[np.ndarray, "*draws N"],
    base_size: Float[np.ndarray, "*draws N"],
    *,
    axis: int = -1,
) -> Any:
    """sum(one) / sum(size) - sum(base) / sum(base_size), along `axis`."""
    return one.sum(axis) / size.sum(axis) - base.sum(axis) / base_size.sum(axis)


def paired_differences(
    one: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], benchmark: str
) -> dict[str, Any]:
    """`one` minus `baseline` over the items that both have: score and gold bits per byte, with 95 % intervals.

    Bits are per byte of the text that each of the two scored, so tokenizers may differ.
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
    out["score"], out["score_interval"] = float(scores.mean()), bootstrap(np.mean, scores)
    bits = [(a, b) for a, b in pairs if a["gold_bits"] is not None and b["gold_bits"] is not None]
    out["bits_items"] = len(bits)
    if bits:
        columns = [
            np.asarray([s[name] for s in own], float)
            for own in zip(*bits, strict=True)
            for name in ("gold_bits", "gold_bytes")
        ]
        out["bits"] = float(difference_of_ratios(*columns))
        out["bits_interval"] = bootstrap(difference_of_ratios, *columns)
    return out


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a benchmark and checkpoint, with paired differences to the first checkpoint (`LEGEND`)."""
    head = [
        "benchmark",
        "checkpoint",
        "connection",
        "context",
        "metric",
        "shots",
        "items",
        "cut",
        "score (%)",
        "difference (points)",
        "gold bits/byte",
        "difference",
    ]
    rows = [head, ["---"] * 6 + ["---:"] * 6]
    for name in results[0]["benchmarks"]:
        for result in results:
            own = result["benchmarks"][name]
            d = {} if result is results[0] else paired_differences(result["samples"], results[0]["samples"], name)
            paper = "" if own["shots"] == own["paper_shots"] else f" (paper: {own['paper_shots']})"
            error = "" if own["stderr"] is None else f" ± {100 * own['stderr']:.1f}"
            bits = own["gold_bits_per_byte"]
            settings = result["settings"]
            beyond = f" (trained: {settings['trained_context']})" if _beyond(result) else ""
            cut = own["truncated"] or results[0]["benchmarks"][name]["truncated"]
            within = not (_beyond(result) or _beyond(results[0]) or cut)
            rows.append(
                [
                    name,
                    result["checkpoint"],
                    result["connection"],
                    f"{settings['context']}{beyond}",
                    own["metric"],
                    f"{own['shots']}{paper}",
                    str(own["items"]),
                    str(own["truncated"]),
                    f"{100 * own['score']:.1f}{error}",
                    _difference(d, "score", within and d.get("items", 0) >= FEWEST_BOLD, 100.0, "{:+.1f}"),
                    "" if bits is None else f"{bits:.3f}",
                    _difference(d, "bits", within and d.get("bits_items", 0) >= FEWEST_BOLD, 1.0, "{:+.3f}"),
                ]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Sentences on what the numbers of a checkpoint are not."""
    context, out = result["settings"]["context"], []
    if _beyond(result):
        out.append(beyond_training(result["checkpoint"], result["settings"]["trained_context"], context))
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


def _beyond(result: Mapping[str, Any]) -> bool:
    return result["settings"]["context"] > result["settings"]["trained_context"]


def _difference(found: Mapping[str, Any], name: str, may_be_bold: bool, factor: float, form: str) -> str:
    if name not in found:
        return ""
    text, interval = form.format(factor * found[name]), found[f"{name}_interval"]
    if interval is None:
        return text
    low, high = (form.format(factor * end) for end in interval)
    text = f"{text} [{low}, {high}]"
    return f"**{text}**" if may_be_bold and (interval[0] > 0 or interval[1] < 0) else text
