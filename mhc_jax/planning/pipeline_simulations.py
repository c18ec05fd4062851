"""Simulations of pipeline schedules with the costs of a model's stages, and the table that `experiments/pipeline.py` prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import require
from mhc_jax.pipeline_schedules.simulate import Costs, Timeline, by_hand, simulate
from mhc_jax.pipeline_schedules.tables import Schedule, make
from mhc_jax.pipeline_schedules.validate import peak_activations, validate
from mhc_jax.planning import stage_costs

CostsOfStages = Callable[[Schedule], Costs]
"""A function that takes a schedule and returns the costs of a model cut into the schedule's stages."""


@dataclass(frozen=True)
class Row:
    """The simulation of one schedule with one set of costs, which is one row of the table."""

    label: str
    """Name of the connection, followed by `recompute` or model.remat if the backward recomputes.  Empty for costs given by hand."""
    run: Timeline
    """The simulated step."""
    sized: bool
    """Whether `run.activations` are the bytes that the connections keep.  Otherwise they are numbers of activations."""
    over: float | None = None
    """Makespan of this row divided by the makespan of the first row with this schedule, minus 1.  None for that first row."""

    @property
    def unit(self) -> str:
        """Unit of the row's times: seconds, or empty if the costs are given by hand."""
        return "s" if self.label else ""

    @property
    def title(self) -> str:
        """Title of the row's picture: schedule, connection, sizes and bubble fraction."""
        schedule = self.run.schedule
        numbers = f"{schedule.devices} devices, {schedule.stages} stages, {schedule.microbatches} microbatches"
        return f"{schedule.name}{', ' if self.label else ''}{self.label}: {numbers}, bubble {100 * self.run.bubble_fraction:.1f} %"


def schedules(names: Sequence[str], devices: int, microbatches: int) -> list[Schedule]:
    """Make the schedules with these names, and check that each is valid."""
    made = [make(name, devices, microbatches) for name in names]
    for schedule in made:
        validate(schedule)
    return made


def of_hand(schedules: Sequence[Schedule], F: float, B: float, W: float, pair: float, send: float) -> list[Row]:
    """Simulate the schedules with costs given by hand.

    F, B and W are the times of every stage, whatever the number of stages into which a schedule cuts the model.
    """
    return _rows(schedules, {"": lambda schedule: by_hand(schedule.stages, F, B, W, pair, send)})


def of_model(
    schedules: Sequence[Schedule],
    config: ExperimentConfig,
    kinds: Sequence[str],
    rates: stage_costs.Rates,
    pair: float,
) -> list[Row]:
    """Simulate the schedules with costs that `stage_costs.from_model` computes, once for each connection of `kinds`.

    A connection with more than one stream is simulated a second time, with streams that the backward recomputes.  A
    microbatch is one sequence.
    """
    config.model.require_resolved()
    T = config.data.sequence_length
    costs: dict[str, CostsOfStages] = {}
    for kind in kinds:
        model = config.with_settings(model={"connection": connections.parse(kind)}).model
        label = connections.spec(model.connection)
        of_stages = functools.partial(stage_costs.from_model, model, T, rates=rates, pair=pair)
        costs[label] = lambda schedule, of=of_stages: of(schedule.stages)
        if model.connection.num_streams > 1:
            costs[f"{label}, recompute"] = lambda schedule, of=of_stages: of(schedule.stages, recompute=True)
    return _rows(schedules, costs)


def of_compiled(schedules: Sequence[Schedule], files: Mapping[str, Mapping[str, Any]], blocks: int) -> list[Row]:
    """Simulate the schedules with the costs of train steps that were compiled for a slice.

    Args:
      schedules: the schedules to simulate.
      files: contents of files that `experiments/compile.py --json` wrote, by name.  The first row of the first file is the
        baseline.  Two rows with the same connection and model.remat are one line of the table (`stage_costs.from_compiled`).
      blocks: number of blocks of the whole model.

    Raises:
      InputError: a file is not from `experiments/compile.py --json`, or rows of one line of the table do not go together.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, file in files.items():
        require(
            "rows" in file and "config" in file,
            f"{name} is not of experiments/compile.py --json=FILE; give a file that it wrote.",
        )
        remat = file["config"]["model"]["remat"]
        for row in file["rows"]:
            found.setdefault(row["connection"] + (f", remat {remat}" if remat != "none" else ""), []).append(row)
    costs: dict[str, CostsOfStages] = {
        label: functools.partial(stage_costs.from_compiled, rows, blocks=blocks) for label, rows in found.items()
    }
    return _rows(schedules, costs)


def of_report(
    schedules: Sequence[Schedule], report: Mapping[str, Any], workload: str, names: Sequence[str], blocks: int
) -> list[Row]:
    """Simulate the schedules with times from a device report, which `stage_costs.from_report` divides among stages."""
    costs: dict[str, CostsOfStages] = {
        name: lambda schedule, name=name: stage_costs.from_report(report, workload, name, schedule.stages, blocks)
        for name in names
    }
    return _rows(schedules, costs)


def _rows(schedules: Sequence[Schedule], costs: Mapping[str, CostsOfStages]) -> list[Row]:
    rows = []
    for schedule in schedules:
        base = None
        for label, of_stages in costs.items():
            stages = of_stages(schedule)
            run = simulate(schedule, stages)
            over = None if base is None else run.makespan / base - 1
            rows.append(Row(label, run, bool(stages.activations), over))
            base = base or run.makespan
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table with one row for each simulation.

    Times are in the unit of the costs.  The column `activations` is the largest number of activations that a device holds at once,
    each of one stage and one microbatch.  The column `kept by connections` is the most that a device holds at
    once for the backward of connections, in GB.
    """
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
