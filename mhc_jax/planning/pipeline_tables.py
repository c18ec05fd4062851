"""The rows that `experiments/pipeline.py` prints: schedules with costs by hand, of a model, or of a device report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_jax.config import ExperimentConfig, ModelConfig
from mhc_jax.connections import spec
from mhc_jax.errors import require
from mhc_jax.planning import pipeline_costs
from mhc_jax.planning.table import with_connection
from mhc_jax.schedules.simulate import Costs, Timeline, by_hand, simulate
from mhc_jax.schedules.tables import make
from mhc_jax.schedules.validate import peak_activations, validate


@dataclass(frozen=True)
class Row:
    """One schedule with one set of costs."""

    label: str
    """Connection and whether it recomputes; empty by hand."""
    run: Timeline
    unit: str
    """Of times: `s`, or empty where the costs have none."""
    sized: bool
    """Whether activations are bytes, those that the connections keep."""
    over: float | None = None
    """Makespan over the first connection's, less 1."""

    @property
    def title(self) -> str:
        """For the picture."""
        schedule = self.run.schedule
        numbers = f"{schedule.devices} devices, {schedule.stages} stages, {schedule.microbatches} microbatches"
        return f"{schedule.name}{', ' if self.label else ''}{self.label}: {numbers}, bubble {100 * self.run.bubble_fraction:.1f} %"


def of_hand(names: Sequence[str], P: int, M: int, F: float, B: float, W: float, pair: float, send: float) -> list[Row]:
    """A stage of the model takes the same time under every schedule."""
    return _rows(names, P, M, {"": lambda stages: by_hand(stages, F, B, W, pair, send)}, unit="")


def of_model(
    names: Sequence[str],
    P: int,
    M: int,
    config: ExperimentConfig,
    connections: Sequence[str],
    rates: pipeline_costs.Rates,
    pair: float,
) -> list[Row]:
    """One sequence a microbatch and device; kinds with streams once more with recompute."""
    config.model.require_vocabulary()
    T = config.data.sequence_length
    each: dict[str, Callable[[int], Costs]] = {}
    for given in connections:
        model = with_connection(config, given).model
        name = spec(model.connection)

        def cost(stages: int, model: ModelConfig = model, recompute: bool = False) -> Costs:
            return pipeline_costs.from_model(model, T, stages, rates, recompute=recompute, pair=pair)

        each[name] = cost
        if model.connection.num_streams > 1:
            each[f"{name}, recompute"] = functools.partial(cost, recompute=True)
    return _rows(names, P, M, each)


def of_compiled(names: Sequence[str], P: int, M: int, files: Sequence[Mapping[str, Any]], blocks: int) -> list[Row]:
    """Steps that were compiled for a slice (contents of files of `experiments/compile.py`), the first of them the baseline.

    Raises:
      InputError: a file is of something else, or two rows are of one connection and one model.remat.
    """
    each: dict[str, Callable[[int], Costs]] = {}
    for found in files:
        require("rows" in found and "config" in found, "A file is not of experiments/compile.py --json=FILE.")
        remat = found["config"]["model"]["remat"]
        for row in found["rows"]:
            label = row["connection"] + (f", remat {remat}" if remat != "none" else "")
            require(label not in each, f"The files have two rows {label!r}; leave one out.")
            each[label] = functools.partial(pipeline_costs.from_compiled, row, blocks=blocks)
    return _rows(names, P, M, each)


def of_report(
    names: Sequence[str],
    P: int,
    M: int,
    report: Mapping[str, Any],
    workload: str,
    connections: Sequence[str],
    blocks: int,
) -> list[Row]:
    """Measured layers; messages take no time."""
    return _rows(
        names,
        P,
        M,
        {
            one: lambda stages, one=one: pipeline_costs.from_report(report, workload, one, stages, blocks)
            for one in connections
        },
    )


def _rows(
    names: Sequence[str], P: int, M: int, each: Mapping[str, Callable[[int], Costs]], unit: str = "s"
) -> list[Row]:
    rows = []
    schedules = [make(name, P, M) for name in names]  # mistakes before the first simulation
    for schedule in schedules:
        validate(schedule)
        base = None
        for label, cost in each.items():
            own = cost(schedule.stages)
            run = simulate(schedule, own)
            over = None if base is None else run.makespan / base - 1
            rows.append(Row(label, run, unit, bool(own.activations), over))
            base = base or run.makespan
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Times in the unit of the costs; activations in stages of one microbatch, and what the connections keep of them."""
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
        cells += [
            f"{max(run.activations) / 1e9:.2f}" if row.sized else "",
            "" if row.over is None else f"{100 * row.over:+.2f} %",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)
