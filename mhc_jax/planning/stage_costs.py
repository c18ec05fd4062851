r"""Times of the stages of a pipeline: from a configuration and a chip's rates, from a compiled step, or from a device report.

From a configuration (`from_model`) the parts of one microbatch on one device take, for a block of two sub-layers:

    branches     6 FLOPs per weight and token, as `cost.counts.model_cost` counts: a third in F, a third in I, a third in W
    connection   bytes of two boundaries: $(2n + 2)C$ elements per token forward, $(5n + 5)C$ backward, all of it in F and I
    recompute    $(2n + 2)C$ per boundary once more in I, for kinds with streams; blocks are the stages (mHC section 4.3.3)
    message      $nC$ elements per token over one link

$(5n + 5)C$ is what the fused backward kernels move at n = 4, 25C (`experiments/compile.py` and `kernels/bench.py --compile` list
it).  n = 1 is the plain residual with its pre-norm.  The input embedding is free, the output embedding is on the last stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.cost.counts import model_cost, stream_elements
from mhc_jax.errors import one_of, require
from mhc_jax.planning.slices import CHIPS
from mhc_jax.schedules.simulate import Costs


@dataclass(frozen=True)
class Rates:
    """What a device reaches, per second."""

    flops: float
    """FLOPs of the branches."""
    bandwidth: float
    """Bytes between chip and memory, for the connections."""
    link: float
    """Bytes from one stage to the next."""


def chip_rates(name: str, flops_share: float, bandwidth_share: float) -> Rates:
    """Rates of one of `slices.CHIPS` at shares of its peaks.

    The shares are assumptions.  The link is one port at its peak.
    """
    one_of("The chip", name, CHIPS)
    require(
        0 < flops_share <= 1 and 0 < bandwidth_share <= 1,
        f"The shares of a chip's peaks are {flops_share} and {bandwidth_share}; they lie between 0 and 1.",
    )
    chip = CHIPS[name]
    return Rates(flops_share * chip.flops, bandwidth_share * chip.bandwidth, chip.link)


def blocks_of_stages(blocks: int, stages: int, head: float = 0.0) -> list[int]:
    """Number of blocks of each stage: they are given, one by one, to the stage with the least work.

    The last stage may be left with the output embedding alone.

    Args:
      blocks: of the model.
      stages: of the model.
      head: work of the output embedding, in blocks.

    Raises:
      InputError: there are fewer blocks than stages without an output embedding.
    """
    require(
        blocks >= stages - (head > 0),
        f"{blocks} blocks do not divide into {stages} stages; use at most {blocks} stages.",
    )
    given, work = [0] * stages, [0.0] * (stages - 1) + [head]
    for _ in range(blocks):
        least = min(range(stages), key=work.__getitem__)
        given[least] += 1
        work[least] += 1.0
    return given


def from_model(
    config: ModelConfig, sequence_length: int, stages: int, rates: Rates, recompute: bool = False, pair: float = 1.0
) -> Costs:
    """Seconds of one microbatch of one sequence, and bytes that the connections keep of it.

    Args:
      config: with its vocabulary.
      sequence_length: T.
      stages: of the model.
      rates: of one device.
      recompute: keep streams at the entry of a stage alone, and compute the others again.
      pair: see `Costs`.
    """
    T, C, width = sequence_length, config.width, jnp.dtype(config.stream_dtype).itemsize
    cost, n = model_cost(config, T), stream_elements(config) // config.width
    head = 2.0 * config.vocab_size * C * T / rates.flops
    branches = (cost.training_flops - cost.connection_flops) * T / rates.flops / 3 - head
    block = branches / config.num_layers
    boundary = 2 * (2 * n + 2) * C * width * T / rates.bandwidth
    again = boundary if recompute and n > 1 else 0.0
    blocks = blocks_of_stages(config.num_layers, stages, head / (block + boundary))

    F = [b * (block + boundary) for b in blocks]
    W = [b * block for b in blocks]
    B = [b * (2 * block + 2.5 * boundary + again) for b in blocks]
    F[-1], B[-1], W[-1] = F[-1] + head, B[-1] + 2 * head, W[-1] + head
    # With one stream the branch's input is the stream; with more, h and y are kept beside the streams, or y alone.
    elements = [2 * b * (n + 2 if n > 1 else 1) if not again else n + 2 * b for b in blocks]
    kept = tuple(float(e * C * width * T) for e in elements)
    return Costs(tuple(F), tuple(B), tuple(W), pair, n * C * width * T / rates.link, kept)


def from_compiled(row: Mapping[str, Any], stages: int, blocks: int) -> Costs:
    """Seconds as the compiler estimates them, from a pipelined train step of the same block (`experiments/compile.py --json`).

    A stage in the middle gives the cost of a block.  What the last stage takes beyond that is the loss, which counts in F alone; it
    gets fewer blocks for it, as in `from_model`.

    Args:
      row: of one connection.
      stages: of the model.
      blocks: of the whole model.

    Raises:
      InputError: the row is of no pipeline, or of one without a stage in the middle or without W.
    """
    require("pipeline" in row, "The row is of no pipeline; compile it with --config.mesh.stage=4.")
    pipeline = row["pipeline"]
    require(
        pipeline["stages"] >= 3,
        f"The compiled step has {pipeline['stages']} stages, so none in the middle; compile 3 or more.",
    )
    times, tick = pipeline["seconds"], pipeline["seconds"]["tick"]
    require(
        times["W"][1] > 0, f"The schedule {pipeline['schedule']!r} has no W of its own; compile 'zb1p' or 'dualpipe'."
    )
    F, B, W = ((times[kind][1] - tick) / pipeline["blocks"] for kind in "FBW")
    first, last = (times["F"][k] - times["F"][1] for k in (0, -1))
    given = blocks_of_stages(blocks, stages, last / (F + B))
    all_F, all_B, all_W = ([b * each + tick for b in given] for each in (F, B, W))
    all_F[0], all_F[-1] = all_F[0] + first, all_F[-1] + last
    return Costs(tuple(all_F), tuple(all_B), tuple(all_W), pipeline["pair"], times["message"])


def from_report(report: Mapping[str, Any], workload: str, connection: str, stages: int, blocks: int) -> Costs:
    """Seconds of one sequence from the measured train steps of `experiments/device_report.py`, for blocks of that shape.

    Residual's step is divided into F, I and W as the branches' FLOPs are.  What another connection adds is divided by its bytes:
    two sevenths to F, the rest to I.  Messages take no time.

    Args:
      report: contents of report.json of one device.
      workload: `27b`, `3b` or `tiny`.
      connection: name of a row of its train steps.
      stages: of the model; they must divide the blocks.
      blocks: of the whole model.

    Raises:
      InputError: the report has no such step, or blocks do not divide into stages.
    """
    part = report["parts"].get(f"step/{workload}")
    steps = [key.removeprefix("step/") for key in report["parts"] if key.startswith("step/")]
    require(part is not None, f"The report has no train steps of {workload!r}; it has {', '.join(steps) or 'none'}.")
    rows = {row["name"]: row["ms"] for row in part["steps"] if row["status"] == "ok"}
    one_of("The connection", connection, rows)
    require(
        "residual" in rows,
        f"The train steps of {workload!r} have no row 'residual', which the others are taken against.",
    )
    require(blocks % stages == 0, f"{blocks} blocks do not divide into {stages} stages; use a divisor.")
    share = blocks // stages / part["shape"]["num_layers"] / part["batch_size"] / 1e3
    base, more = rows["residual"] * share, (rows[connection] - rows["residual"]) * share
    F, B, W = base / 3 + more * 2 / 7, base * 2 / 3 + more * 5 / 7, base / 3
    return Costs((F,) * stages, (B,) * stages, (W,) * stages)
