"""Times of the stages of a model for the simulator: from its configuration and a chip's rates, from what a compiler estimates, or
from a device report.

From a configuration (`from_model`), for one microbatch on one device and a block of two sub-layers:

    branches     6 FLOPs a weight and token, as `cost.counts.model_cost` counts: a third F, a third I, a third W
    connection   bytes of two boundaries: (2n + 2)C elements a token forward, (5n + 5)C backward, all of it in F and I
    recompute    (2n + 2)C a boundary once more in I, for kinds with streams; blocks are the stages (mHC section 4.3.3)
    message      nC elements a token over one link

(5n + 5)C is what the fused backward kernels move at n = 4 (25 C; `experiments/compile.py` and `kernels/bench.py --compile` list
it); n = 1 is the plain residual with its pre-norm.  The input embedding is free, the output one is on the last stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.cost.counts import model_cost, stream_elements
from mhc_jax.errors import one_of, require
from mhc_jax.planning.slices import CHIPS
from mhc_jax.schedules.simulate import Costs


@dataclass(frozen=True)
class Rates:
    """What a device reaches, per second."""

    flops: float
    """Of the branches."""
    bandwidth: float
    """Bytes between chip and memory, for the connections."""
    link: float
    """Bytes from one stage to the next."""


def chip_rates(name: str, flops_share: float = 0.5, bandwidth_share: float = 0.7) -> Rates:
    """Shares of the peaks of one of `slices.CHIPS`; the shares are assumptions, and the link is one port at its peak."""
    one_of("The chip", name, CHIPS)
    require(
        0 < flops_share <= 1 and 0 < bandwidth_share <= 1,
        f"The shares of a chip's peaks are {flops_share} and {bandwidth_share}; they lie between 0 and 1.",
    )
    chip = CHIPS[name]
    return Rates(flops_share * chip.flops, bandwidth_share * chip.bandwidth, chip.link)


def blocks_of_stages(blocks: int, stages: int, head: float = 0.0) -> list[int]:
    """Blocks of each stage, one by one to the stage with the least work; `head`: work of the output embedding, in blocks.

    The last stage may be left with the output embedding alone.

    Raises:
      InputError: fewer blocks than stages without a head.
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
    config: ModelConfig,
    sequence_length: int,
    stages: int,
    rates: Rates,
    sequences: int = 1,
    recompute: bool = False,
    pair: float = 1.0,
) -> Costs:
    """Seconds of one microbatch of `sequences`, and bytes that the connections keep of it.

    Args:
      config: with its vocabulary.
      sequence_length: T.
      stages: of the model.
      rates: of one device.
      sequences: of one device and microbatch.
      recompute: keep streams at the entry of a stage alone and compute the rest of them again.
      pair: see `Costs`.
    """
    N, C, width = sequences * sequence_length, config.width, jnp.dtype(config.stream_dtype).itemsize
    found, n = model_cost(config, sequence_length), stream_elements(config) // config.width
    head = 2.0 * config.vocab_size * C * N / rates.flops
    branches = (found.training_flops - found.connection_flops) * N / rates.flops / 3 - head
    block = branches / config.num_layers
    boundary = 2 * (2 * n + 2) * C * width * N / rates.bandwidth
    again = boundary if recompute and n > 1 else 0.0
    blocks = blocks_of_stages(config.num_layers, stages, head / (block + boundary))

    F = [b * (block + boundary) for b in blocks]
    W = [b * block for b in blocks]
    B = [b * (2 * block + 2.5 * boundary + again) for b in blocks]
    F[-1], B[-1], W[-1] = F[-1] + head, B[-1] + 2 * head, W[-1] + head
    # Of n = 1 the branch's input is the stream; else h and y are kept beside the streams, or y alone.
    elements = [2 * b * (n + 2 if n > 1 else 1) if not again else n + 2 * b for b in blocks]
    kept = tuple(float(e * C * width * N) for e in elements)
    return Costs(tuple(F), tuple(B), tuple(W), pair, n * C * width * N / rates.link, kept)


def from_compiled(row: Mapping[str, Any], stages: int, blocks: int, leveled: bool = True) -> Costs:
    """Seconds as the compiler estimates them, from a pipelined train step of `experiments/compile.py --json` with that block.

    Of its stages one in the middle gives the cost of a block, the last less that the loss, which is all in F.

    Args:
      row: of one connection.
      stages: of the model.
      blocks: of the whole model.
      leveled: the last stage gets fewer blocks for the loss, as in `from_model`; else all get as many.

    Raises:
      InputError: the row is of no pipeline, or of one without a stage in the middle or without W.
    """
    require("pipeline" in row, "The row is of no pipeline; compile it with --mesh=stage=4.")
    found = row["pipeline"]
    require(
        found["stages"] >= 3,
        f"The compiled step has {found['stages']} stages, so none in the middle; compile 3 or more.",
    )
    times, tick = found["seconds"], found["seconds"]["tick"]
    require(times["W"][1] > 0, f"The schedule {found['schedule']!r} has no W of its own; compile 'zb1p' or 'dualpipe'.")
    F, B, W = ((times[kind][1] - tick) / found["blocks"] for kind in "FBW")
    first, last = (times["F"][k] - times["F"][1] for k in (0, -1))
    given = blocks_of_stages(blocks, stages, last / (F + B) if leveled else 0.0)
    all_F, all_B, all_W = ([b * each + tick for b in given] for each in (F, B, W))
    all_F[0], all_F[-1] = all_F[0] + first, all_F[-1] + last
    return Costs(tuple(all_F), tuple(all_B), tuple(all_W), found["pair"], times["message"])


def from_report(
    report: Mapping[str, Any],
    workload: str,
    connection: str,
    stages: int,
    blocks: int,
    sequences: int = 1,
    link: float = 0.0,
) -> Costs:
    """Seconds from the measured train steps of `experiments/device_report.py` (report.json), for `blocks` blocks of that shape.

    Residual's step is divided into F, I and W as the branches' FLOPs are; what `connection` adds goes by its bytes: two sevenths
    to F, the rest to I.

    Args:
      report: of one device.
      workload: `27b`, `3b` or `tiny`.
      connection: name of a row of its train steps.
      stages: of the model; they must divide the blocks.
      blocks: of the whole model.
      sequences: of a microbatch.
      link: bytes per second from one stage to the next; 0: messages take no time.

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
    shape = part["shape"]
    share = blocks // stages / shape["num_layers"] * sequences / part["batch_size"] / 1e3
    base, more = rows["residual"] * share, (rows[connection] - rows["residual"]) * share
    n = connections.default_config(connection.split()[0]).num_streams
    moved = n * shape["width"] * sequences * shape["sequence_length"] * jnp.dtype(shape["dtype"]).itemsize
    F, B, W = base / 3 + more * 2 / 7, base * 2 / 3 + more * 5 / 7, base / 3
    return Costs((F,) * stages, (B,) * stages, (W,) * stages, 1.0, moved / link if link else 0.0)
