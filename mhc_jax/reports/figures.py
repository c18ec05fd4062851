"""Draw one figure of runs by its name, for a paper, together with its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from mhc_jax import plots
from mhc_jax.analysis.grouping import Baseline, Variant, group, mean_record
from mhc_jax.analysis.run_reader import RunRecord, labels, seed_name
from mhc_jax.errors import InputError, one_of, require, user_path
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.reports.page import changed_settings, find_runs
from mhc_jax.reports.record import read_record, shortened
from mhc_jax.sweeps.grid import read_sweep_json

NAMED = plots.FIGURES | SWEEP_FIGURES
"""Every figure of runs by its name."""
SUFFIXES = (".pdf", ".svg", ".png")
DPI = 300
"""Dots per inch of a PNG file for a paper."""
WIDTHS = (1.5, 20.0)
TEXTS = (4.0, 20.0)
"""Smallest and largest width in inches and text size in points that `size_of` takes."""


def read_folders(folders: Sequence[Path]) -> tuple[list[RunRecord], Baseline | None]:
    """Read the runs in all folders, and the baseline of the first sweep among them.

    Args:
      folders: each is a run folder, a folder of run folders, the folder of a sweep, or the record of a sweep.

    Raises:
      InputError: there is no such folder, or no run in it.
    """
    records, baseline = [], None
    for folder in folders:
        if (folder / "runs.json").is_file():
            records += read_record(folder)
            continue
        sweep = read_sweep_json(folder) if (folder / "sweep.json").is_file() else {"runs": [], "baseline": None}
        records += find_runs(folder, sweep["runs"])
        baseline = baseline or sweep["baseline"] or None
    return records, baseline


def read_variants(folder: str | Path) -> list[Variant]:
    """Read the runs in a folder, as `read_folders` does, and group them into variants."""
    return group(*read_folders([user_path(folder)]))


def figure_of(name: str, variants: Sequence[Variant]) -> Figure | str:
    """Return the figure of some variants, or what their runs lack for it as a sentence.  Notebooks show either.

    Args:
      name: name of the figure, a key of `NAMED`.
      variants: the variants.  Curves are means over their seeds, matrices those of one seed (`draw_figure`).

    Raises:
      InputError: there is no such figure.
    """
    one_of("The name of the figure", name, NAMED)
    try:
        return NAMED[name].draw(_shown(name, variants))
    except plots.NothingToDraw as error:
        return f"{name} is not drawn: {error.missing}."


def _shown(name: str, variants: Sequence[Variant]) -> Sequence[Variant | RunRecord]:
    """Return what a figure shows of some variants: the variants, one run of each, or the mean over the seeds of each."""
    if name in SWEEP_FIGURES:
        return variants
    return [variant.shown_run if NAMED[name].matrices else mean_record(variant) for variant in variants]


def size_of(size: str, text: float = 0.0, panel: str = "") -> plots.Size:
    """Return the size of a figure.

    Args:
      size: a name of `plots.SIZES`, or a width in inches.
      text: size of text in points.  0 means that of the named size, and 8 points for a width in inches.
      panel: as `plots.Size.panel`.

    Raises:
      InputError: the size is neither a known name nor a width in inches, or a number is too small or too large.
    """
    if size in plots.SIZES:
        chosen = plots.SIZES[size]
    else:
        try:
            chosen = plots.Size(float(size), 8.0)
        except ValueError:
            one_of("size", size, plots.SIZES, "or a width in inches, such as 5.5")
            raise
        require(
            WIDTHS[0] <= float(size) <= WIDTHS[1],
            f"size is {size} inches; it must lie between {WIDTHS[0]:g} and {WIDTHS[1]:g}, or be one of {', '.join(plots.SIZES)}.",
        )
    require(
        not text or TEXTS[0] <= text <= TEXTS[1],
        f"The text size is {text:g} points; it must lie between {TEXTS[0]:g} and {TEXTS[1]:g}.",
    )
    return chosen._replace(text=text or chosen.text, panel=panel)


class Drawn(NamedTuple):
    """A figure, what to write below it, and the names of all its panels, also of those that were left out."""

    figure: Figure
    caption: str
    panels: list[str]


def draw_figure(name: str, folders: Sequence[Path], size: plots.Size, each_run: bool = False) -> Drawn:
    """Draw a figure of the runs in some folders.

    Runs that differ in seeds alone are a variant.  Figures of curves show the mean over the seeds of each variant that finished,
    figures of matrices one run of each variant, and figures of seeds show all.

    Args:
      name: name of the figure, a key of `NAMED`.
      folders: folders that `read_folders` takes.
      size: size of the figure, and which of its panels.
      each_run: whether to show each run by itself.

    Raises:
      InputError: there is no such figure, folder, run or panel, or the runs lack what the figure shows.
    """
    one_of("The name of the figure", name, NAMED)
    require(bool(folders), "RUNS is missing; give the folder of a sweep, of runs, or of one run.")
    records, baseline = read_folders(folders)
    plot, variants = NAMED[name], group(records, baseline)
    several = len(variants) < len(records)
    where = ", ".join(map(str, folders))
    require(
        name != "loss_gap" or not several or each_run,
        f"loss_gap compares single runs, and {where} has several seeds; draw gap_curves, or set --each_run.",
    )
    by_run = name not in SWEEP_FIGURES and (each_run or not several)
    shown = records if by_run else _shown(name, variants)
    how = "Lines and bands are means over the seeds that finished."
    if by_run or name in SWEEP_FIGURES:
        how = "Every run is shown by itself." if by_run else ""
    elif plot.matrices:
        how = "Of each variant the figure shows the run with the lowest seed that finished."
    try:
        with plots.drawn_at(size._replace(panel="")):
            figure = plot.draw(shown)
        names = plots.panel_names(figure)
        if size.panel:
            with plots.drawn_at(size):
                figure = plot.draw(shown)
    except plots.NothingToDraw as error:
        raise InputError(f"{name} cannot be drawn of {where}: {error.missing}.{_advice(records)}") from None
    drawn = plots.panel_names(figure)
    only = ""
    if size.panel:
        several = f"are the panels {', '.join(map(repr, drawn[:-1]))} and" if len(drawn) > 1 else "is the panel"
        only = f"Shown {several} {drawn[-1]!r} alone."
    text = plot.caption_of(drawn)
    return Drawn(figure, " ".join(filter(None, [f"{plot.title}.", only, text, how, *_runs(variants)])), names)


def _advice(records: Sequence[RunRecord]) -> str:
    if any(len(record.train) > 1 or record.diagnostics for record in records):
        return ""
    return " These runs have no measurements over steps; a record keeps them if record.py is given --metrics."


def _runs(variants: Sequence[Variant]) -> list[str]:
    """Return the sentences of a caption that say which runs a figure shows, how long they trained, and at which settings."""
    runs = [run for variant in variants for run in variant.runs.values()]
    parts = []
    for variant in variants:
        count = f", of {len(variant.runs)} finished {len(variant.finished)}" * (
            len(variant.finished) < len(variant.runs)
        )
        seeds = ", ".join(seed_name(seed).partition(" ")[2] for seed in sorted(variant.runs))
        seeds = f"seed{'s' * (len(variant.runs) > 1)} {seeds}"
        parts.append(f"{variant.label} ({seeds}{count})")
    sentences = [f"Runs: {'; '.join(parts)}."]
    steps = sorted({int(run.train["step"][-1]) for run in runs if len(run.train["step"])})
    if steps:
        sentences.append(f"Last logged step: {' or '.join(map(str, steps))}.")
    diverged = [
        f"{label} at step {run.diverged_at}"
        for label, run in zip(labels(runs), runs, strict=True)
        if run.diverged_at is not None
    ]
    if diverged:
        sentences.append(f"Diverged: {'; '.join(diverged)}.")
    commits = sorted({str(run.env["commit"])[:7] for run in runs if run.env.get("commit")})
    return [*sentences, shortened(changed_settings(runs)), *([f"Commit {', '.join(commits)}."] if commits else [])]


def write_figure(drawn: Drawn, outputs: Sequence[Path]) -> list[Path]:
    """Write a figure in each format that is wanted, and its caption beside it.  Return the paths of the files.

    Args:
      drawn: the figure.
      outputs: files with a suffix of `SUFFIXES`.  A path without a suffix stands for one file of each format.

    Raises:
      InputError: a suffix is not known, or a file cannot be written.
    """
    for output in outputs:
        if output.suffix:
            one_of("The suffix of the output", output.suffix, SUFFIXES)
    files = [file for path in outputs for file in ([path] if path.suffix else map(path.with_suffix, SUFFIXES))]
    captions = list(dict.fromkeys(file.with_suffix(".txt") for file in files))
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            plots.write(drawn.figure, file, DPI)
        for file in captions:
            file.write_text(drawn.caption + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"The figure cannot be written to {error.filename}: {error.strerror}.") from error
    return [*files, *captions]
