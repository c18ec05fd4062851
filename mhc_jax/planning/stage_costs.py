r"""Times of the stages of a pipeline: from a configuration and a chip's rates, from a compiled step, or from a device report.

`from_model` takes a configuration.  It counts the following costs of one microbatch for each block of two sub-layers:

    branches     6 FLOPs per weight and token, as `cost.counts.model_cost` counts: a third in F, a third in I, a third in W
    connection   for each of two boundaries, the bytes of $(2n + 2)C$ elements per token in F, and of $(5n + 5)C$ in I
    recompute    if asked for and n > 1: for each boundary $(2n + 2)C$ elements per token once more in I, because a stage keeps only
                 the streams that enter it (mHC section 4.3.3, where the recomputed blocks are the stages)
    message      $nC$ elements per token over one link

At n = 4 the fused backward kernels move 25C elements, which is $(5n + 5)C$ (listed by `experiments/compile.py` and
`kernels/bench.py --compile`).  n = 1 is the plain residual with its pre-norm.  The input embedding counts as no time.  The last
stage computes the output embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mhc_jax.config import ModelConfig
from mhc_jax.cost.counts import model_cost, stream_elements
from mhc_jax.errors import one_of, require
from mhc_jax.pipeline.program import compile_table
from mhc_jax.pipeline_schedules.simulate import Costs
from mhc_jax.pipeline_schedules.tables import Schedule
from mhc_jax.planning.slices import CHIPS


@dataclass(frozen=True)
class Rates:
    """The speeds that a device is assumed to reach."""

    flops: float
    """FLOPs per second in the branches and the output embedding."""
    bandwidth: float
    """Memory bandwidth in bytes per second, which alone limits the operations of the connections."""
    link: float
    """Bytes per second that a device sends to the device of the next stage."""


def chip_rates(name: str, flops_share: float, bandwidth_share: float) -> Rates:
    """Return the rates of a chip of `slices.CHIPS`: its peak FLOPs and bandwidth, multiplied by the given shares.

    The shares are assumptions of the caller.  `Rates.link` is the peak of one port of the chip.
    """
    one_of("The chip", name, CHIPS)
    require(
        0 < flops_share <= 1 and 0 < bandwidth_share <= 1,
        f"The shares of a chip's peaks are {flops_share} and {bandwidth_share}; they lie between 0 and 1.",
    )
    chip = CHIPS[name]
    return Rates(flops_share * chip.flops, bandwidth_share * chip.bandwidth, chip.link)


def blocks_of_stages(blocks: int, stages: int, head: float = 0.0) -> list[int]:
    """Divide the blocks among the stages: each block in turn goes to the stage with the least work.

    The last stage may be left with the output embedding alone.

    Args:
      blocks: number of blocks of the model.
      stages: number of stages of the model.
      head: work of the output embedding on the last stage, in units of one block's work.

    Returns:
      The number of blocks of each stage.

    Raises:
      InputError: there are too few blocks.  Every stage needs one block, except the last stage if `head` is above 0.
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
    """Return the seconds that a microbatch of one sequence takes on each stage, and the bytes that the connections keep of it.

    Args:
      config: configuration of the model, with its vocabulary size.
      sequence_length: number of tokens of the sequence, T.
      stages: number of stages of the model.
      rates: the rates of one device.
      recompute: whether the backward computes the streams inside a stage again, from the streams that entered the stage.
      pair: time of an overlapped F&B, divided by F + B, as in `Costs`.
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
    # What a stage keeps of one token, in units of C.  With one stream each sub-layer keeps the stream, which is its branch's input.
    # With n > 1 each sub-layer keeps n streams and its branch's input and output.  With recompute a stage keeps the n streams that
    # enter it, and each sub-layer keeps its branch's output alone.
    elements = [2 * b * (n + 2 if n > 1 else 1) if not again else n + 2 * b for b in blocks]
    kept = tuple(float(e * C * width * T) for e in elements)
    return Costs(tuple(F), tuple(B), tuple(W), pair, n * C * width * T / rates.link, kept)


def from_compiled(rows: Sequence[Mapping[str, Any]], schedule: Schedule, blocks: int) -> Costs:
    """Return the seconds of each stage, from the compiler's estimates for pipelined train steps of models with the same blocks.

    An operation of a stage of b blocks takes a + b c.  Two steps with different numbers of blocks a stage give a and c: the work
    of every stage, such as messages and their buffers, and that of every block.  From one step alone, a is the work of a tick
    without an operation (`CompiledPipeline.tick_cost`), and all else counts for every block.  An overlapped F&B saves as many
    seconds of F + B as in the step with the fewest blocks a stage, which is none if its schedule has no F&B.

    The second stage of a compiled step gives these times.  The time by which F of the last stage exceeds F of the second stage is
    the time of the loss and its gradient.  This time counts in F alone, and the last stage gets fewer blocks to make up for it, as
    in `from_model`.

    Args:
      rows: rows of files that `experiments/compile.py --json` wrote, for one connection.  The one with the fewest blocks a stage
        gives the times of messages, of the loss and of the first stage's own work.
      schedule: the schedule, whose stages the model is cut into.  The messages that it sends in one direction in a tick share one
        link.
      blocks: number of blocks of the whole model.

    Raises:
      InputError: a compiled step has no pipeline, fewer than 3 stages, or no W, or two steps have equally many blocks a stage.
    """
    pipelines = sorted((_checked(row) for row in rows), key=lambda pipeline: pipeline["blocks"])
    first = pipelines[0]
    counts = [pipeline["blocks"] for pipeline in pipelines]
    require(
        len(set(counts)) == len(counts) <= 2,
        f"The compiled steps have {', '.join(map(str, counts))} blocks a stage; give one step, or two that differ in it.",
    )
    times, tick, S = first["seconds"], first["seconds"]["tick"], schedule.stages

    def line(kind: str) -> tuple[float, float]:
        """Return (seconds of a stage, seconds of each of its blocks) of an operation."""
        points = [(pipeline["blocks"], pipeline["seconds"][kind][1]) for pipeline in pipelines]
        (b, t), (d, u) = points if len(points) == 2 else ((0, tick), points[0])
        each = (u - t) / (d - b)
        return t - b * each, each

    (F_stage, F), (B_stage, B), (W_stage, W) = map(line, "FBW")
    enter, loss = (times["F"][k] - times["F"][1] for k in (0, -1))
    given = blocks_of_stages(blocks, S, loss / (F + B))
    all_F, all_B, all_W = ([a + b * c for b in given] for a, c in ((F_stage, F), (B_stage, B), (W_stage, W)))
    all_F[0], all_F[-1] = all_F[0] + enter, all_F[-1] + loss
    saved = (1 - first["pair"]) * (times["F"][1] + times["B"][1])
    pair = 1 - saved / (F_stage + B_stage + (F + B) * blocks / S)
    sends = max(len(channel.kinds) for channel in compile_table(schedule).channels)
    return Costs(tuple(all_F), tuple(all_B), tuple(all_W), pair, times["message"] * sends)


def _checked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a row that describes its pipeline, after checking that `from_compiled` can use it."""
    require("pipeline" in row, "The row is of no pipeline; compile it with --config.mesh.stage=4.")
    pipeline = row["pipeline"]
    require(
        pipeline["stages"] >= 3,
        f"The compiled step has {pipeline['stages']} stages, so none in the middle; compile 3 or more.",
    )
    require(
        pipeline["seconds"]["W"][1] > 0,
        f"The schedule {pipeline['schedule']!r} has no W of its own; compile 'zb1p' or 'dualpipe'.",
    )
    return pipeline


def from_report(report: Mapping[str, Any], workload: str, connection: str, stages: int, blocks: int) -> Costs:
    """Return the seconds of one sequence on each stage, from train steps that `experiments/device_report.py` has measured.

    The blocks are taken to be those of the measured model.  The time of its step with the residual connection is divided like the
    branches' FLOPs: a third each to F, I and W.  The time that another connection adds to this step is divided like the bytes that
    the connection moves: two sevenths to F, and the rest to I.  Messages take no time.

    Args:
      report: contents of report.json of one device.
      workload: name of the measured model: `27b`, `3b` or `tiny`.
      connection: name of a row of the workload's train steps.
      stages: number of stages of the model.  It must divide the number of blocks.
      blocks: number of blocks of the whole model.

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
