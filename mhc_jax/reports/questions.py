"""Read the records of the three questions' sweeps, and make the section and the figure of each question from them."""

from __future__ import annotations

import csv
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mhc_jax.analysis import answers, rate_margins
from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.plots import answers as figures
from mhc_jax.reports import answers as tables
from mhc_jax.reports import rate_margins as margin_tables
from mhc_jax.reports.record import newest_record, read_record


class Question(NamedTuple):
    """What the records say on one question."""

    text: str
    """The section of ANSWERS.md, as Markdown."""
    draw: Callable[[], Figure]
    """Draws the figure."""


def questions(experiments: str | Path) -> dict[str, Question]:
    """Return each question whose sweep has a record, by the name of the sweep.

    Args:
      experiments: the folder with the folders `records` and `sweeps`.

    Raises:
      InputError: a record lacks a part that the rule of its question needs.
    """
    records = Path(experiments) / "records"
    longer = _runs(records, "residual_longer")
    ratios = _beside(
        records,
        "residual_longer",
        "step_times.json",
        "experiments/steptime.py --json",
        lambda content: {name: float(row["ratio"]) for name, row in content["steps"].items()},
    )
    found = {}
    if maps := _runs(records, "which_map"):
        home = _runs(records, "which_map_home")
        text = tables.which_map_part(maps, home, _runs(records, "which_map_large"), longer, ratios)
        found["which_map"] = Question(
            text,
            lambda: figures.which_map_figure(answers.which_map(maps), answers.which_map_home(home) if home else None),
        )
    if mixing := _runs(records, "mixing_needed"):
        h_res = _beside(
            records,
            "mixing_needed",
            "h_res.json",
            "experiments/answers.py --freeze",
            lambda content: {
                "rise": {name: {int(seed): float(x) for seed, x in of.items()} for name, of in content["rise"].items()},
                "shares": {
                    name: [(float(first), float(last)) for first, last in of.values()]
                    for name, of in content["off_diagonal"].items()
                },
            },
        )
        text = tables.mixing_needed_part(mixing, h_res.get("rise", {}), h_res.get("shares", {}), longer, ratios)
        found["mixing_needed"] = Question(text, lambda: figures.mixing_needed_figure(answers.mixing_needed(mixing)))
    if margins := _runs(records, "muon_margin"):
        sweep = runpy.run_path(str(Path(experiments) / "sweeps" / "muon_margin.py"))
        rule = sweep["LOSS_BELOW"], sweep["RATES"]
        rates, norms = _runs(records, "muon_rates"), _largest_norms(records, "muon_rates")
        text = margin_tables.muon_margin_part(margins, *rule, rates, norms)
        found["muon_margin"] = Question(
            text, lambda: figures.muon_margin_figure(rate_margins.muon_margin(margins, *rule))
        )
    return found


def _runs(records: Path, name: str) -> list[RunRecord]:
    """Return the runs of the newest record of a sweep, or none if there is no record."""
    folder = newest_record(records, name)
    return read_record(folder) if folder else []


def _beside(
    records: Path, name: str, file: str, command: str, of: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `of` the content of a JSON file that `command` wrote into the newest record of a sweep, or nothing without a file."""
    folder = newest_record(records, name)
    if not folder or not (folder / file).is_file():
        return {}
    try:
        return of(read_json(folder / file))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder / file} is not in the form in which its command writes it; run {command} again."
        ) from error


def _largest_norms(records: Path, name: str) -> dict[str, float]:
    """Return the largest norm of a gradient after the warm-up of each run in the newest record of a sweep, by the run's name."""
    folder = newest_record(records, name)
    if folder is None:
        return {}
    with (folder / "results.csv").open(newline="") as file:
        return {row["run"]: float(row["max_grad_norm"]) for row in csv.DictReader(file) if row["max_grad_norm"]}
