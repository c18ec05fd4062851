"""Pipeline schedules simulated with the costs of a model's stages, and the table of them that `experiments/pipeline.py` prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import require
from mhc_jax.planning import stage_costs
from mhc_jax.schedules.simulate import Costs, Timeline, by_hand, simulate
from mhc_jax.schedules.tables import Schedule, make
from mhc_jax.schedules.validate import peak_activations, validate

CostsOfStages = Callable[[int], Costs]
"""Costs of a model that is cut into that many stages."""


@dataclass(frozen=True)
class Row:
    """One schedule with one set of costs."""

    label: str
    """Connection and whether it recomputes; empty for costs by hand."""
    run: Timeline
    sized: bool
    """Whether activations are bytes, those that the connections keep."""
    over: float | None = None
    """Makespan over the first row's of the same schedule, less 1."""

    @property
    def unit(self) -> str:
        """Unit of times; empty for costs by hand."""
        return "s" if self.label else ""

    @property
    def title(self) -> str:
        """Schedule, connection, sizes and bubble, for the picture."""
        schedule = self.run.schedule
        numbers = f"{schedule.devices} devices, {schedule.stages} stages, {schedule.microbatches} microbatches"
        return f"{schedule.name}{', ' if self.label else ''}{self.label}: {numbers}, bubble {100 * self.run.bubble_fraction:.1f} %"


def schedules(names: Sequence[str], devices: int, microbatches: int) -> list[Schedule]:
    """Make and prove the schedules of these names."""
    made = [make(name, devices, microbatches) for name in names]
    for schedule in made:
        validate(schedule)
    return made


def of_hand(schedules: Sequence[Schedule], F: float, B: float, W: float, pair: float, send: float) -> list[Row]:
    """Simulate stages that take the same given times under every schedule."""
    return _rows(schedules, {"": lambda stages: by_hand(stages, F, B, W, pair, send)})


def of_model(
    schedules: Sequence[Schedule],
    config: ExperimentConfig,
    kinds: Sequence[str],
    rates: stage_costs.Rates,
    pair: float,
) -> list[Row]:
    """Simulate a model with each connection, and kinds with streams once more with recompute; a microbatch is one sequence."""
    require(config.model.vocab_size > 0, "model.vocab_size is 0, the tokenizer's; set --config.model.vocab_size=...")
    T = config.data.sequence_length
    costs: dict[str, CostsOfStages] = {}
    for kind in kinds:
        model = config.with_settings(model={"connection": connections.parse(kind)}).model
        label = connections.spec(model.connection)
        of_stages = functools.partial(stage_costs.from_model, model, T, rates=rates, pair=pair)
        costs[label] = of_stages
        if model.connection.num_streams > 1:
            costs[f"{label}, recompute"] = functools.partial(of_stages, recompute=True)
    return _rows(schedules, costs)


def of_compiled(schedules: Sequence[Schedule], files: Sequence[Mapping[str, Any]], blocks: int) -> list[Row]:
    """Simulate steps that were compiled for a slice.

    Args:
      schedules: to simulate.
      files: contents of files that `experiments/compile.py --json` wrote; the first row of the first is the baseline.
      blocks: of the whole model.

    Raises:
      InputError: a file is of something else, or two rows are of one connection and one model.remat.
    """
    costs: dict[str, CostsOfStages] = {}
    for file in files:
        require("rows" in file and "config" in file, "A file is not of experiments/compile.py --json=FILE.")
        remat = file["config"]["model"]["remat"]
        for row in file["rows"]:
            label = row["connection"] + (f", remat {remat}" if remat != "none" else "")
            require(label not in costs, f"The files have two rows {label!r}; leave one out.")
            costs[label] = functools.partial(stage_costs.from_compiled, row, blocks=blocks)
    return _rows(schedules, costs)


def of_report(
    schedules: Sequence[Schedule], report: Mapping[str, Any], workload: str, names: Sequence[str], blocks: int
) -> list[Row]:
    """Simulate train steps that a device report has measured; see `stage_costs.from_report`."""
    costs: dict[str, CostsOfStages] = {
        name: functools.partial(stage_costs.from_report, report, workload, name, blocks=blocks) for name in names
    }
    return _rows(schedules, costs)


def _rows(schedules: Sequence[Schedule], costs: Mapping[str, CostsOfStages]) -> list[Row]:
    rows = []
    for schedule in schedules:
        base = None
        for label, of_stages in costs.items():
            stages = of_stages(schedule.stages)
            run = simulate(schedule, stages)
            over = None if base is None else run.makespan / base - 1
            rows.append(Row(label, run, bool(stages.activations), over))
            base = base or run.makespan
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Table of times in the unit of the costs, activations in stages of one microbatch, and what the connections keep of them."""
    unit = f" ({rows[0].unit})" if rows and rows[0].unit else ""
    out = [
        f"| schedule | connection | devices x stages | step{unit} | longest wait{unit} | waiting (%) | messages exposed{unit} | "
        "activations (stages) | kept by connections (GB) | over the first |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        run, schedule = row.run, row.run.schedule
        cells = [schedule.name, row.label, f"{schedule.devices} x {schedule.stages}", f"{run.makespan:.4g}"]
        cells += [f"{max(run.bubble):.4g}", f"{100 * run.bubble_fraction:.1f}", f"{run.exposed:.3g}"]
        cells += [f"{max(most for most, _ in peak_activations(schedule))}"]
        cells += [f"{max(run.activations) / 1e9:.2f}" if row.sized else ""]
        cells += ["" if row.over is None else f"{100 * row.over:+.2f} %"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)
