"""What runs say in numbers and words: a row a run, a row a setting, and the findings.

Every page, record, notebook and terminal table takes its numbers and sentences from here, so that they follow one rule
(`statistics.MIN_SEEDS`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mhc_jax.analysis.grouping import Setting, frontier_lines, group, loss_threshold
from mhc_jax.analysis.records import RunRecord, labels, last_diagnostics, paired_gap
from mhc_jax.analysis.statistics import MIN_SEEDS, Paired, paired, stability_frontier, verdict

EQUAL_STREAMS_COSINE = 0.999
"""Mean cosine above which streams count as equal in direction."""
EQUAL_STREAMS_SIZE = 1.01
"""Largest over smallest RMS of the streams of a sub-layer below which they count as equal in size."""
ONE_STREAM_RANK = 1.01
"""`stream_rank` below which streams count as one vector up to sign and scale: more than 99 % of their squared size is then its."""
NBSP = "\N{NO-BREAK SPACE}"
"""Lets a cell of the table break before its parenthesis only."""
DASH = "–"
COLUMNS = (
    "Losses are in nats/token; training loss and step time are those of summary.json. Gap: validation loss minus that of the "
    "baseline's run of the same seed, at the last step that both have; below zero is better. Gain: largest composite gain that "
    "diagnostics saw during the run (mean over the sampled tokens). Stream |cosine|: mean absolute cosine between pairs of "
    "streams, 1 where they are one vector up to sign and scale. Stream rank: participation ratio of their Gram matrix, from 1 (one "
    "vector) to n (orthogonal, of one size). Both are means over sub-layers, and over the sampled tokens of one held-out sequence, "
    "at the last diagnostics. Headings sort."
)
STATISTICS = (
    "Over seeds, in nats/token of validation loss: mean and standard deviation; mean difference from the baseline's runs of the "
    "same seeds with Student's 95 % interval; p-values of the paired t test and of the sign-flip test, which with K seeds cannot "
    "fall below 2^(1-K); effect: mean difference in standard deviations of the baseline over seeds. Losses are those of runs that "
    f"finished. Below {MIN_SEEDS} seeds, and where a run of either has not finished, there is no interval, no p-value and no "
    "verdict. A baseline agrees with what is compared in every setting but the connection's, or but those that the sweep chose. No "
    "correction for the number of rows is made."
)


class Cell(NamedTuple):
    """Text to show, and the number or word to sort by; None sorts last."""

    text: str
    value: float | str | None


def validation_gap(record: RunRecord, baseline: RunRecord) -> tuple[int, float] | None:
    """Last step at which both runs have a finite validation loss, and their difference there.

    `record` minus `baseline` in nats/token: below 0 means that `record` is better.
    """
    steps, gap = paired_gap(record, baseline, "validation")
    finite = np.flatnonzero(np.isfinite(gap))
    return (int(steps[finite[-1]]), float(gap[finite[-1]])) if len(finite) else None


def rows(records: Sequence[RunRecord], settings: Sequence[Setting] | None = None) -> list[dict[str, Cell]]:
    """One mapping a run from heading (with its unit) to cell; the same headings in every row.

    Args:
      records: the runs.
      settings: `group` of them; None: with the usual baseline.
    """
    settings = group(records) if settings is None else settings
    of_run = {str(run.folder): setting for setting in settings for run in setting.runs.values()}
    out = []
    for record, label in zip(records, labels(records), strict=True):
        setting = of_run[str(record.folder)]
        baseline = setting.baseline.runs.get(record.seed) if setting.baseline else None
        parameters, step_time = record.result("parameters"), record.result("step_time_s")
        memory = record.result("peak_memory_bytes")
        ended = f" at step {record.diverged_at}" if record.diverged_at is not None else ""
        out.append(
            {
                "run": Cell(label, label),
                "parameters": Cell(_si(parameters) + _added(parameters, baseline), parameters),
                "FLOPs per token": _cell(record.result("flops_per_token"), _si),
                "step time (ms)": Cell(
                    _text(None if step_time is None else 1e3 * step_time, "{:.4g}") + _ratio(step_time, baseline),
                    step_time,
                ),
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


def _final(record: RunRecord, key: str) -> float | None:
    """A number of the end of the run; None where it did not finish, whatever it was last."""
    return record.result(key) if record.status == "finished" else None


def compare(setting: Setting) -> Paired | None:
    """Paired differences in validation loss from the baseline; None without a baseline or a seed that both have.

    There is no interval and no p-value where a run of either has not finished: those that did may be the lucky ones.
    """
    if setting.baseline is None:
        return None
    found = paired(setting.results("validation_loss"), setting.baseline.results("validation_loss"))
    if found is None or not _lost(setting):
        return found
    return dataclasses.replace(found, t_interval=None, p_t=None, p_sign_flip=None, effect=None)


def _lost(setting: Setting) -> int:
    """Runs of a setting and of its baseline that diverged or have not ended."""
    both = [setting, *([setting.baseline] if setting.baseline else [])]
    return sum(len(one.runs) - len(one.finished) for one in both)


def statistics_rows(settings: Sequence[Setting]) -> list[dict[str, Cell]]:
    """One mapping a setting from heading to cell."""
    out = []
    for setting in settings:
        losses = list(setting.results("validation_loss").values())
        mean = float(np.mean(losses)) if losses else None
        deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
        result = compare(setting)
        spikes = sum(len(run.spike_steps) for run in setting.runs.values())
        short = _short(setting, result)
        out.append(
            {
                "setting": Cell(setting.label, setting.label),
                "seeds": Cell(_seeds(setting), len(setting.runs)),
                "mean loss": _cell(mean, "{:.4f}"),
                "st. dev.": _cell(deviation, "{:.4f}"),
                "baseline": Cell(setting.baseline.label, setting.baseline.label)
                if setting.baseline
                else Cell(DASH, None),
                "difference": _cell(result and result.mean, "{:+.4f}"),
                "t interval": _interval(result and result.t_interval),
                "p (t)": _cell(result and result.p_t, "{:.3g}"),
                "p (sign flip)": _cell(result and result.p_sign_flip, "{:.3g}"),
                "effect": _cell(result and result.effect, "{:+.1f}"),
                "max gain forward": _gain_cell(list(setting.runs.values()), "forward"),
                "max gain backward": _gain_cell(list(setting.runs.values()), "backward"),
                "stream |cosine|": _cell(
                    _of_streams(setting.any_run, setting.mean("final_stream_cosine_abs")), "{:.3f}"
                ),
                "stream rank": _cell(_of_streams(setting.any_run, setting.mean("final_stream_rank")), "{:.2f}"),
                "spikes": Cell(str(spikes), spikes),
                "diverged": Cell(str(setting.diverged), setting.diverged),
                "verdict": Cell(short, short),
            }
        )
    return out


def _seeds(setting: Setting) -> str:
    """Number of runs, and how many of them finished where not all did."""
    total, done = len(setting.runs), len(setting.finished)
    return f"{total}" if done == total else f"{done} of {total}"


def _of_streams(record: RunRecord, value: float | None) -> float | None:
    """The value where there are several streams; with one it is 1 by definition, and no measurement."""
    return value if record.num_streams > 1 else None


def _short(setting: Setting, result: Paired | None) -> str:
    if setting.is_baseline:
        return "baseline"
    if setting.baseline is None:
        return "not compared"
    if result is None or result.t_interval is None:
        return "no claim"
    return ("lower" if result.mean < 0 else "higher") if result.resolved else "not resolved"


def findings(settings: Sequence[Setting]) -> list[str]:
    """Sentences computed from the numbers: losses by setting, failures, gains, streams, spikes, stability frontier."""
    return [
        *(f"{s.label}: {sentence}" for s in settings if (sentence := _claim(s))),
        *_failures(settings),
        *_gains(settings),
        *_streams(settings),
        *_spikes(settings),
        *_frontiers(settings),
    ]


def _claim(setting: Setting) -> str:
    if setting.is_baseline:
        return ""
    if setting.baseline is None:
        return "not compared: no run that a baseline could be has its other settings."
    found = compare(setting)
    if found is not None and found.seeds >= MIN_SEEDS and _lost(setting):
        return (
            f"no claim, since {_lost(setting)} runs of it and {setting.baseline.label} did not finish; loss minus "
            f"{setting.baseline.label}'s {found.mean:+.4f} over the {found.seeds} seeds that finished in both."
        )
    return verdict(found, setting.baseline.label)


def _failures(settings: Sequence[Setting]) -> list[str]:
    out = []
    for setting in settings:
        steps = [str(run.diverged_at) for run in setting.runs.values() if run.status == "diverged"]
        if steps:
            out.append(
                f"{setting.label} diverged in {len(steps)} of {len(setting.runs)} runs, at step {', '.join(steps)}: these have "
                "no final loss."
            )
        if setting.unfinished:
            out.append(
                f"{setting.label}: {setting.unfinished} of {len(setting.runs)} runs have not ended and have no final loss."
            )
    return out


def _gains(settings: Sequence[Setting]) -> list[str]:
    gains = []
    for setting in settings:
        forward, backward = (_gain_cell(list(setting.runs.values()), side) for side in ("forward", "backward"))
        if DASH not in (forward.text, backward.text):
            gains.append(f"{setting.label} {forward.text} forward, {backward.text} backward")
    if not gains:
        return []
    return [f"Largest composite gain of any run and diagnostics step (1 amplifies nothing): {'; '.join(gains)}."]


def _streams(settings: Sequence[Setting]) -> list[str]:
    """What the streams of finished runs were at the last diagnostics, from the second sub-layer on: the first reads the entry."""
    out = []
    for setting in settings:
        found = [
            [last_diagnostics(run, key) for key in ("stream_cosine", "stream_rank", "stream_rms")]
            for run in setting.finished
            if run.num_streams > 1
        ]
        measured = [[values[1][1:] for values in run if values is not None] for run in found]
        if not measured or any(len(run) < 3 or not len(run[0]) or not all(map(_finite, run)) for run in measured):
            continue
        cosines, ranks, sizes = zip(*measured, strict=True)
        n, L, lowest = sizes[0].shape[1], len(ranks[0]) + 1, min(float(np.nanmin(values)) for values in cosines)
        one = [int((values < ONE_STREAM_RANK).sum()) for values in ranks]
        spread = max(float(np.nanmax(values.max(1) / values.min(1))) for values in sizes)
        if lowest > EQUAL_STREAMS_COSINE and spread < EQUAL_STREAMS_SIZE:
            out.append(
                f"{setting.label}: streams stayed equal in direction and size at every sub-layer (cosine above "
                f"{EQUAL_STREAMS_COSINE}). A mixing matrix with unit row sums changes nothing there, so H_res is inert."
            )
        elif any(one):
            out.append(
                f"{setting.label}: streams are nearly one vector up to sign and scale at {', '.join(map(str, one))} of the {L - 1} "
                f"sub-layers after the first{', a number a seed' * (len(one) > 1)}: at least 99 % of their squared size lies along "
                f"it (rank below {ONE_STREAM_RANK}). There H_res changes little but signs and scales. The rank lies between "
                f"{_span(ranks)} of {n}."
            )
        else:
            out.append(
                f"{setting.label}: streams differ at every sub-layer: their rank lies between {_span(ranks)} of {n}."
            )
    return out


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _span(values: Sequence[np.ndarray]) -> str:
    return f"{min(map(np.nanmin, values)):.2f} and {max(map(np.nanmax, values)):.2f}"


def _spikes(settings: Sequence[Setting]) -> list[str]:
    counts = [
        f"{setting.label} {', '.join(str(len(run.spike_steps)) for run in setting.runs.values())}"
        for setting in settings
        if any(run.spike_steps for run in setting.runs.values())
    ]
    return [f"Loss spikes, a number a run: {'; '.join(counts)}."] if counts else []


def _frontiers(settings: Sequence[Setting]) -> list[str]:
    out, threshold = [], loss_threshold(settings)
    for name, losses in frontier_lines(settings).items():
        best, first = stability_frontier(losses, threshold)
        seeds = min(len(values) for values in losses.values())
        reach = f"stable up to learning rate {best:g}" if best is not None else "stable at no learning rate tried"
        end = f"not at {first:g}" if first is not None else "the largest whose runs have ended"
        out.append(
            f"{name}: {reach}, {end} (stable: every run finished below {threshold:.3f} nats/token; runs a rate: {seeds} or "
            "more; lower rates that finished above it are slow, not unstable)."
        )
    return out


def _gain_cell(runs: Sequence[RunRecord], side: str) -> Cell:
    """Largest composite gain of the runs; `overflow` where one of them is beyond float64, which summary.json holds as null."""
    if any(run.result("gains_overflowed") for run in runs):
        return Cell("overflow", math.inf)
    values = [value for run in runs if (value := run.result(f"max_composite_{side}")) is not None]
    return _cell(max(values, default=None), "{:.4g}")


def _interval(interval: tuple[float, float] | None) -> Cell:
    if interval is None:
        return Cell(DASH, None)
    return Cell(f"{interval[0]:+.4f} to {interval[1]:+.4f}", interval[0])


def _si(value: float | int | None) -> str:
    """1234567 to 1.235M."""
    if value is None:
        return DASH
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:g}"


def _text(value: Any, form: str) -> str:
    return DASH if value is None or not math.isfinite(value) else form.format(value)


def _cell(value: Any, form: Callable[[Any], str] | str) -> Cell:
    return Cell(form(value) if callable(form) else _text(value, form), value)


def _added(value: float | int | None, baseline: RunRecord | None) -> str:
    base = baseline and baseline.result("parameters")
    return f" ({100 * (value / base - 1):+.2f}{NBSP}%)" if value is not None and base else ""


def _ratio(value: float | int | None, baseline: RunRecord | None) -> str:
    base = baseline and baseline.result("step_time_s")
    return f" (×{value / base:.2f})" if value is not None and base else ""


def _gap_cell(record: RunRecord, baseline: RunRecord | None) -> Cell:
    """The gap; with its step where that is not the baseline run's last."""
    gap = validation_gap(record, baseline) if baseline else None
    if baseline is None or gap is None:
        return Cell(DASH, None)
    step, value = gap
    last = int(baseline.validation["step"][-1])
    return Cell(f"{value:+.4f}" + (f" (step{NBSP}{step})" if step != last else ""), value)
