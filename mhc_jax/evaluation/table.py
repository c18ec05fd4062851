"""Compare checkpoints in a table: scores, bits per byte of gold answers, and paired differences over items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from mhc_jax.runs.trained import beyond_training

RESAMPLES = 2000
"""Number of resamples from which a bootstrapped interval is computed."""
CHUNK = 200
"""Number of resamples that are drawn at a time.  200 resamples of MMLU's 14,042 items take 22 MB for each column of `bootstrap`."""
FEWEST_RESAMPLED = 2
"""Smallest number of items for which an interval is computed.  All resamples of a single item are equal."""
FEWEST_BOLD = 30
"""Smallest number of items with which a difference may be printed in bold.

With few items the interval is too narrow.  The 95 % percentile interval of the mean of N normal values covers the true mean with
probability P(|t| < 1.96 sqrt((N - 1) / N)), where t has N - 1 degrees of freedom: 0.936 for 30 items, 0.846 for 5.
"""
LEGEND = (
    f"score: mean over items, ± its standard error. gold bits/byte: -log2 of the probability of the gold answers, over their "
    f"bytes. difference: to the first checkpoint over the same items, with a bootstrapped 95 % interval over items (none below "
    f"{FEWEST_RESAMPLED}). Bold: 0 lies outside the interval, which holds {FEWEST_BOLD} items or more, and both checkpoints read "
    "no further than they were trained, with every prompt whole."
)


def bootstrap(statistic: Callable[..., Any], *columns: Float[np.ndarray, " N"]) -> tuple[float, float] | None:
    """Return the bootstrapped 95 % interval of a statistic over items (percentile method), or None below `FEWEST_RESAMPLED` items.

    Every call draws with the same random numbers.

    Args:
      statistic: function of the columns, with a keyword `axis`, the axis of the items.
      columns: arrays with one value for each of N items.  A resample takes all values of the items that it draws.
    """
    if len(columns[0]) < FEWEST_RESAMPLED:
        return None
    result = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=CHUNK,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def difference_of_ratios(
    bits: Float[np.ndarray, "*draws N"],
    size: Float[np.ndarray, "*draws N"],
    base_bits: Float[np.ndarray, "*draws N"],
    base_size: Float[np.ndarray, "*draws N"],
    *,
    axis: int = -1,
) -> Any:
    """Return sum(bits) / sum(size) - sum(base_bits) / sum(base_size), where sums are over the N items along `axis`."""
    return bits.sum(axis) / size.sum(axis) - base_bits.sum(axis) / base_size.sum(axis)


def paired_differences(
    samples: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], benchmark: str
) -> dict[str, Any]:
    """Return the differences in score and in gold bits per byte, `samples` minus `baseline`, over the items that both have.

    The bits of each checkpoint are divided by the bytes of the text that it scored, so that their tokenizers may differ.

    Args:
      samples, baseline: samples of two checkpoints, as from `run.collect`.
      benchmark: name of the benchmark.

    Returns:
      A mapping with the keys items (number of items that both have), score (difference in score), score_interval, bits_items
      (number of items with gold_bits in both), bits (difference in gold bits per byte) and bits_interval.  Intervals are 95 %
      intervals (`bootstrap`).  Differences and intervals for which there are no items are absent.
    """
    base = {(s["task"], s["doc_id"]): s for s in baseline if s["benchmark"] == benchmark}
    pairs = [
        (s, base[s["task"], s["doc_id"]])
        for s in samples
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
            np.asarray([s[name] for s in side], float)
            for side in zip(*bits, strict=True)
            for name in ("gold_bits", "gold_bytes")
        ]
        out["bits"] = float(difference_of_ratios(*columns))
        out["bits_interval"] = bootstrap(difference_of_ratios, *columns)
    return out


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each benchmark and checkpoint, and paired differences to the first checkpoint.

    `LEGEND` explains the columns.

    Args:
      results: results of each checkpoint from `run.evaluate`.
    """
    rows = []
    for name in results[0]["benchmarks"]:
        for result in results:
            numbers, settings = result["benchmarks"][name], result["settings"]
            d = {} if result is results[0] else paired_differences(result["samples"], results[0]["samples"], name)
            paper = "" if numbers["shots"] == numbers["paper_shots"] else f" (paper: {numbers['paper_shots']})"
            error = "" if numbers["stderr"] is None else f" ± {100 * numbers['stderr']:.1f}"
            bits = numbers["gold_bits_per_byte"]
            beyond = f" (trained: {settings['trained_context']})" if _beyond(result) else ""
            cut = numbers["truncated"] or results[0]["benchmarks"][name]["truncated"]
            within = not (_beyond(result) or _beyond(results[0]) or cut)
            rows.append(
                {
                    "benchmark": name,
                    "checkpoint": result["checkpoint"],
                    "connection": result["connection"],
                    "context": f"{settings['context']}{beyond}",
                    "metric": numbers["metric"],
                    "shots": f"{numbers['shots']}{paper}",
                    "items": str(numbers["items"]),
                    "cut": str(numbers["truncated"]),
                    "score (%)": f"{100 * numbers['score']:.1f}{error}",
                    "difference (points)": _difference(
                        d, "score", within and d.get("items", 0) >= FEWEST_BOLD, 100.0, "{:+.1f}"
                    ),
                    "gold bits/byte": "" if bits is None else f"{bits:.3f}",
                    "difference": _difference(
                        d, "bits", within and d.get("bits_items", 0) >= FEWEST_BOLD, 1.0, "{:+.3f}"
                    ),
                }
            )
    lines = [list(rows[0]), ["---"] * 6 + ["---:"] * 6, *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Return sentences about an evaluation: warnings if its context is too long or prompts were cut, then its time and folder."""
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
    """Return whether the context of the evaluation of a checkpoint is longer than the sequences of its training."""
    return result["settings"]["context"] > result["settings"]["trained_context"]


def _difference(differences: Mapping[str, Any], name: str, may_be_bold: bool, factor: float, form: str) -> str:
    """Return the text of a table cell: the difference `name` times `factor`, and its interval.  Empty if there is no difference."""
    if name not in differences:
        return ""
    text, interval = form.format(factor * differences[name]), differences[f"{name}_interval"]
    if interval is None:
        return text
    low, high = (form.format(factor * end) for end in interval)
    text = f"{text} [{low}, {high}]"
    return f"**{text}**" if may_be_bold and (interval[0] > 0 or interval[1] < 0) else text
