"""Make the table of runs, the table of variants, and the findings: sentences that say what the runs show.

Every page, record, notebook and terminal table takes its numbers and sentences from this module, so that none of them makes a
claim from fewer than `statistics.MIN_SEEDS` seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mhc_jax.analysis.grouping import Variant, frontier_lines, group, loss_threshold
from mhc_jax.analysis.run_reader import RunRecord, labels, last_diagnostics, paired_gap
from mhc_jax.analysis.statistics import MIN_SEEDS, Paired, paired, stability_frontier, verdict

EQUAL_STREAMS_COSINE = 0.999
"""Streams count as equal in direction if the mean cosine between pairs of streams exceeds this value."""
EQUAL_STREAMS_SIZE = 1.01
"""Streams count as equal in size if the largest root mean square of a stream, divided by the smallest, lies below this value."""
ONE_STREAM_COSINE = 0.99
"""Streams count as one vector up to sign and scale if the mean absolute cosine between pairs of streams exceeds this value, and
their rank lies below `ONE_STREAM_RANK`.  The rank alone does not tell, because it is near 1 as well where one stream outweighs
streams of other directions."""
ONE_STREAM_RANK = 1.01
"""At a rank below this value (`stream_rank` in diagnostics.py), at least 1 / 1.01, that is 99 %, of the sum of the streams' squared
norms lies along one vector."""
STEP_TIME_SPREAD = 1.5
"""If the step times of a variant's seeds differ by more than this factor, the table shows their range, and no ratio to them."""
NBSP = "\N{NO-BREAK SPACE}"
"""No-break space.  Cells of tables have it inside parentheses, so that their text can break before a parenthesis only."""
DASH = "–"
COLUMNS = (
    "Losses are in nats/token; training loss and step time are those of summary.json. Gap: validation loss minus that of the "
    "baseline's run of the same seed, at the last step where both have one; below zero is better. Gain: largest composite gain "
    "over sub-layers and diagnostics steps (mean over the sampled tokens). Stream |cosine|: mean absolute cosine between pairs "
    "of streams, 1 where they are one vector up to sign and scale. Stream rank: participation ratio of their Gram matrix, from "
    "1 (one vector) to n (orthogonal, of one size). Both are means over sub-layers, and over the sampled tokens of one held-out "
    "sequence, at the last diagnostics step. Step times are those of runs that follow each other and are not timed in turns, so "
    "that other work on the machine slows some of them alone; experiments/steptime.py times connections in turns. Where the step "
    f"times of a variant's seeds differ by more than a factor of {STEP_TIME_SPREAD:g}, a cell has their range and no ratio. A "
    "click on a heading sorts."
)
STATISTICS = (
    "Over seeds, in nats/token of validation loss: mean and standard deviation; mean difference from the baseline's runs of the "
    "same seeds with Student's 95 % interval; p-values of the paired t test and of the sign-flip test, which with K seeds cannot "
    "fall below 2^(1-K); effect: mean difference in standard deviations of the baseline over seeds. Losses are those of runs that "
    f"finished. Below {MIN_SEEDS} seeds, and where a run of either has not finished, there is no interval, no p-value and no "
    "verdict. A baseline differs from what is compared in the connection alone, or in the settings that the sweep names. The "
    "p-values are not corrected for the number of rows."
)


class Cell(NamedTuple):
    """A cell of one of the report's tables: its text, and the number or word by which its column is sorted.  None sorts last."""

    text: str
    value: float | str | None


def validation_gap(record: RunRecord, baseline: RunRecord) -> tuple[int, float] | None:
    """Return the last step at which both runs have a finite validation loss, and the difference of the losses at that step.

    The difference is the loss of `record` minus that of `baseline`, in nats/token; below 0, `record` is better.  The result is None
    if there is no such step.
    """
    steps, gap = paired_gap(record, baseline, "validation")
    finite = np.flatnonzero(np.isfinite(gap))
    return (int(steps[finite[-1]]), float(gap[finite[-1]])) if len(finite) else None


def rows(records: Sequence[RunRecord], variants: Sequence[Variant] | None = None) -> list[dict[str, Cell]]:
    """Return the rows of the table of runs: for each run a mapping from heading (with its unit) to cell.

    All rows have the same headings.

    Args:
      records: the runs.
      variants: the same runs as variants.  None means `group(records)`.
    """
    variant_of = {run.folder: variant for variant in variants or group(records) for run in variant.runs.values()}
    out = []
    for record, label in zip(records, labels(records), strict=True):
        variant = variant_of[record.folder]
        baseline = variant.baseline.runs.get(record.seed) if variant.baseline else None
        memory = record.result("peak_memory_bytes")
        ended = f" at step {record.diverged_at}" if record.diverged_at is not None else ""
        out.append(
            {
                "run": _word(label),
                "parameters": _beside_baseline(
                    record, baseline, "parameters", _si, lambda r: f"{100 * (r - 1):+.2f}{NBSP}%"
                ),
                "FLOPs per token": _cell(record.result("flops_per_token"), _si),
                "step time (ms)": _step_time_cell(record, baseline, variant),
                "peak memory (MiB)": _cell(None if memory is None else memory / 2**20, "{:.0f}"),
                "train loss": _cell(_final(record, "train_loss"), "{:.4f}"),
                "validation loss": _cell(_final(record, "validation_loss"), "{:.4f}"),
                "gap to baseline": _gap_cell(record, baseline),
                "bits per byte": _cell(_final(record, "bits_per_byte"), "{:.4f}"),
                "max gain forward": _gain_cell([record], "forward"),
                "max gain backward": _gain_cell([record], "backward"),
                "stream |cosine|": _cell(_of_streams(record, record.result("final_stream_cosine_abs")), "{:.3f}"),
                "stream rank": _cell(_of_streams(record, record.result("final_stream_rank")), "{:.2f}"),
                "spikes": _cell(record.result("spikes"), "{:.0f}"),
                "status": Cell(record.status + ended, record.status),
            }
        )
    return out


def compare(variant: Variant) -> Paired | None:
    """Pair the validation losses of a variant with those of its baseline, seed by seed.

    The result is None if the variant has no baseline, or if no seed has a loss in both.  If a run of the variant or the baseline
    has not finished, the result has no interval and no p-value, because the runs that finished may not be typical.
    """
    if variant.baseline is None:
        return None
    result = paired(variant.results("validation_loss"), variant.baseline.results("validation_loss"))
    if result is None or not _lost(variant):
        return result
    return dataclasses.replace(result, t_interval=None, p_t=None, p_sign_flip=None, effect=None)


def statistics_rows(variants: Sequence[Variant]) -> list[dict[str, Cell]]:
    """Return the rows of the table of variants: for each variant a mapping from heading to cell, all with the same headings."""
    out = []
    for variant in variants:
        runs = list(variant.runs.values())
        losses = list(variant.results("validation_loss").values())
        deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
        result = compare(variant)
        interval = result and result.t_interval
        finished, spikes = len(variant.finished), sum(len(run.spike_steps) for run in runs)
        seeds = f"{len(runs)}" if finished == len(runs) else f"{finished} of {len(runs)}"
        cosine, rank = (
            _of_streams(variant.any_run, variant.mean(f"final_stream_{key}")) for key in ("cosine_abs", "rank")
        )
        out.append(
            {
                "variant": _word(variant.label),
                "seeds": Cell(seeds, len(runs)),
                "mean loss": _cell(variant.mean("validation_loss"), "{:.4f}"),
                "st. dev.": _cell(deviation, "{:.4f}"),
                "baseline": _word(variant.baseline.label) if variant.baseline else Cell(DASH, None),
                "difference": _cell(result and result.mean, "{:+.4f}"),
                "t interval": Cell("{:+.4f} to {:+.4f}".format(*interval), interval[0])
                if interval
                else Cell(DASH, None),
                "p (t)": _cell(result and result.p_t, "{:.3g}"),
                "p (sign flip)": _cell(result and result.p_sign_flip, "{:.3g}"),
                "effect": _cell(result and result.effect, _two_digits),
                "max gain forward": _gain_cell(runs, "forward"),
                "max gain backward": _gain_cell(runs, "backward"),
                "stream |cosine|": _cell(cosine, "{:.3f}"),
                "stream rank": _cell(rank, "{:.2f}"),
                "spikes": Cell(str(spikes), spikes),
                "diverged": Cell(str(variant.diverged), variant.diverged),
                "verdict": _word(_short_verdict(variant, result)),
            }
        )
    return out


def findings(variants: Sequence[Variant]) -> list[str]:
    """Return sentences on what the runs show: losses, failures, gains, streams, spikes and largest stable learning rates."""
    return [
        *(f"{variant.label}: {sentence}" for variant in variants if (sentence := _claim(variant))),
        *_failures(variants),
        *_gains(variants),
        *(f"{variant.label}: {sentence}" for variant in variants if (sentence := _streams(variant))),
        *_spikes(variants),
        *_frontiers(variants),
    ]


# -- sentences


def _claim(variant: Variant) -> str:
    """Return a sentence that compares a variant's loss with its baseline's, as far as the seeds allow a claim."""
    if variant.is_baseline:
        return ""
    if variant.baseline is None:
        return "not compared: no baseline agrees with it in the other settings."
    result = compare(variant)
    if result is not None and result.seeds >= MIN_SEEDS and (lost := _lost(variant)):
        return (
            f"no claim, since {lost} runs of it and {variant.baseline.label} did not finish; loss minus "
            f"{variant.baseline.label}'s {result.mean:+.4f} over the {result.seeds} seeds that finished in both."
        )
    return verdict(result, variant.baseline.label)


def _short_verdict(variant: Variant, result: Paired | None) -> str:
    if variant.is_baseline:
        return "baseline"
    if variant.baseline is None:
        return "not compared"
    if result is None or result.t_interval is None:
        return "no claim"
    return ("lower" if result.mean < 0 else "higher") if result.resolved else "not resolved"


def _lost(variant: Variant) -> int:
    """Return the number of runs of a variant and its baseline that diverged or have not ended."""
    both = [variant, *([variant.baseline] if variant.baseline else [])]
    return sum(len(side.runs) - len(side.finished) for side in both)


def _failures(variants: Sequence[Variant]) -> list[str]:
    out = []
    for variant in variants:
        total, steps = len(variant.runs), [str(r.diverged_at) for r in variant.runs.values() if r.status == "diverged"]
        if steps:
            where = f"at step {', '.join(steps)}: these have no final loss."
            out.append(f"{variant.label} diverged in {len(steps)} of {total} runs, {where}")
        if variant.unfinished:
            out.append(f"{variant.label}: {variant.unfinished} of {total} runs have not ended and have no final loss.")
    return out


def _gains(variants: Sequence[Variant]) -> list[str]:
    gains = []
    for variant in variants:
        forward, backward = (_gain_cell(list(variant.runs.values()), side).text for side in ("forward", "backward"))
        if DASH not in (forward, backward):
            gains.append(f"{variant.label} {forward} forward, {backward} backward")
    if not gains:
        return []
    return [f"Largest composite gain of any run and diagnostics step (1 amplifies nothing): {'; '.join(gains)}."]


def _streams(variant: Variant) -> str:
    """Return a sentence that says whether the streams of a variant's finished runs differ from each other at the end of training.

    The text is empty if no run finished, or if one has a single stream or lacks diagnostics of streams.  The first sub-layer is
    left out, because the streams that it reads come from the entry, unchanged by any connection.
    """
    measures = {key: [] for key in ("stream_cosine", "stream_cosine_abs", "stream_rank", "stream_rms")}
    for run in variant.finished:
        for key, values in measures.items():
            last = last_diagnostics(run, key)
            values.append(np.empty(0) if last is None or run.num_streams == 1 else last[1][1:])
    cosines, absolute, ranks, sizes = measures.values()
    if not ranks or any(not len(v) or not np.isfinite(v).all() for values in measures.values() for v in values):
        return ""
    low, high = f"{min(map(np.min, ranks)):.2f}", f"{max(map(np.max, ranks)):.2f}"
    among = f"{f'is {low}' if low == high else f'lies between {low} and {high}'} of {sizes[0].shape[1]}"
    collapsed = [
        int(((rank < ONE_STREAM_RANK) & (cosine > ONE_STREAM_COSINE)).sum())
        for rank, cosine in zip(ranks, absolute, strict=True)
    ]
    spread = max(float((values.max(1) / values.min(1)).max()) for values in sizes)
    if min(map(np.min, cosines)) > EQUAL_STREAMS_COSINE and spread < EQUAL_STREAMS_SIZE:
        return (
            f"streams stayed equal in direction and size at every sub-layer (cosine above {EQUAL_STREAMS_COSINE}). A mixing "
            "matrix with unit row sums changes nothing there, so H_res is inert."
        )
    if any(collapsed):
        each = ", one number for each seed" if len(collapsed) > 1 else ""
        return (
            f"streams are nearly one vector up to sign and scale at {', '.join(map(str, collapsed))} of the {len(ranks[0])} "
            f"sub-layers after the first{each}: at least 99 % of their squared size lies along it (rank below "
            f"{ONE_STREAM_RANK}, mean absolute cosine above {ONE_STREAM_COSINE}). There H_res changes little but "
            f"signs and scales. The rank {among}."
        )
    return f"streams differ at every sub-layer: their rank {among}."


def _spikes(variants: Sequence[Variant]) -> list[str]:
    counts = [
        f"{variant.label} {', '.join(str(len(run.spike_steps)) for run in variant.runs.values())}"
        for variant in variants
        if any(run.spike_steps for run in variant.runs.values())
    ]
    return [f"Loss spikes, one number for each run: {'; '.join(counts)}."] if counts else []


def _frontiers(variants: Sequence[Variant]) -> list[str]:
    out, threshold = [], loss_threshold(variants)
    for name, losses in frontier_lines(variants).items():
        best, first = stability_frontier(losses, threshold)
        seeds = min(len(values) for values in losses.values())
        below = f"finished below {threshold:.3f} nats/token"
        if best is None:
            reach = "at no learning rate tried" if first is None else f"at no learning rate up to {first:g}"
            all_below = f"{reach} have all runs {below}"
        else:
            after = ", the largest whose runs have ended" if first is None else f", not at {first:g}"
            reach = f"up to learning rate {best:g}{after}"
            all_below = f"all runs {below} at learning rate {best:g}{after}"
        if seeds < MIN_SEEDS:
            count = "one seed" if seeds == 1 else f"{seeds} seeds"
            out.append(f"{name}: {all_below}; {count}, no claim about stability.")
            continue
        out.append(
            f"{name}: stable {reach} (stable: every run {below}; at least {seeds} "
            "runs for each rate; lower rates that finished above it are slow, not unstable)."
        )
    return out


# -- cells of the report's table


def _word(text: str) -> Cell:
    return Cell(text, text)


def _cell(value: Any, form: Callable[[Any], str] | str) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(DASH, value)
    return Cell(form(value) if callable(form) else form.format(value), value)


def _beside_baseline(
    record: RunRecord,
    baseline: RunRecord | None,
    key: str,
    form: Callable[[float], str],
    compared: Callable[[float], str],
) -> Cell:
    """Make the cell of the number `key` of a run's summary.json, with its ratio to the baseline run's number in parentheses."""
    value, base = record.result(key), baseline.result(key) if baseline else None
    if value is None or not base:
        return _cell(value, form)
    return Cell(f"{form(value)} ({compared(value / base)})", value)


def _step_time_cell(record: RunRecord, baseline: RunRecord | None, variant: Variant) -> Cell:
    """Make the cell of a run's step time, with its ratio to the baseline run's or, if its seeds differ widely, with their range."""
    own, base = (_step_times(side) for side in (variant, variant.baseline))
    value = record.result("step_time_s")
    if value is not None and _spread(own) > STEP_TIME_SPREAD:
        low, high = (f"{1e3 * end:.4g}" for end in (min(own), max(own)))
        return Cell(f"{1e3 * value:.4g} (seeds:{NBSP}{low}{NBSP}to{NBSP}{high})", value)
    compared = baseline if _spread(base) <= STEP_TIME_SPREAD else None
    return _beside_baseline(record, compared, "step_time_s", lambda s: f"{1e3 * s:.4g}", lambda r: f"×{r:.2f}")


def _step_times(variant: Variant | None) -> list[float]:
    """Return the positive step times in seconds of a variant's runs."""
    values = [run.result("step_time_s") for run in variant.runs.values()] if variant else []
    return [value for value in values if value is not None and value > 0]


def _spread(values: Sequence[float]) -> float:
    """Return the largest of some positive values divided by the smallest, or 1 if there are none."""
    return max(values) / min(values) if values else 1.0


def _gap_cell(record: RunRecord, baseline: RunRecord | None) -> Cell:
    """Make the cell of the difference `validation_gap`, with its step unless this is the last validation of the baseline run."""
    gap = validation_gap(record, baseline) if baseline else None
    if baseline is None or gap is None:
        return Cell(DASH, None)
    step, value = gap
    last = int(baseline.validation["step"][-1])
    return Cell(f"{value:+.4f}" + (f" (step{NBSP}{step})" if step != last else ""), value)


def _gain_cell(runs: Sequence[RunRecord], side: str) -> Cell:
    """Make the cell of the largest composite gain of the runs.

    The cell says `overflow` if a gain exceeds the range of float64.  summary.json holds such a gain as null.
    """
    if any(run.result("gains_overflowed") for run in runs):
        return Cell("overflow", math.inf)
    values = [value for run in runs if (value := run.result(f"max_composite_{side}")) is not None]
    return _cell(max(values, default=None), "{:.4g}")


def _final(record: RunRecord, key: str) -> float | None:
    """Return the number `key` of a run's summary.json, or None if the run did not finish."""
    return record.result(key) if record.status == "finished" else None


def _of_streams(record: RunRecord, value: float | None) -> float | None:
    """Return `value`, a cosine or rank of streams, or None for a run of one stream, for which it is always 1."""
    return value if record.num_streams > 1 else None


def _two_digits(value: float) -> str:
    """Write a number with its sign and at least two digits that are not leading zeros: -0.043 stays -0.043, and -2 is -2.0."""
    return f"{value:+.1f}" if abs(value) >= 1 else f"{value:+#.2g}"


def _si(value: float | int) -> str:
    """Write a number with an SI prefix: 1234567 becomes 1.235M."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{prefix}"
    return f"{value:g}"
