r"""What a train step costs on a slice of TPUs, from its shapes and from what the compiler says of it.

Memory is the compiler's.  Time is an upper estimate of one device's step:

$$t = t_{compute} + t_{collectives} + t_{wait}$$

`compute` is the compiler's cycles at the chip's clock; a Pallas kernel, which has none, takes the longer of its FLOPs and its
bytes at the chip's peaks.  `collectives` take their bytes over the links of the torus that their group spans (`Slice.bandwidth`),
as if nothing ran beside them.  `wait` is the longest that a device of a pipeline waits, simulated; it is 0 without a pipeline.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig
from mhc_jax.cost import counts, hlo
from mhc_jax.cost.hlo import Collective, Instruction, Program
from mhc_jax.errors import require
from mhc_jax.pipeline.executor import schedule_of
from mhc_jax.planning.compile_ahead import DoesNotFitError, compile_lowered, lower
from mhc_jax.planning.compiled_pipeline import CompiledPipeline
from mhc_jax.planning.slices import Chip, Slice
from mhc_jax.remat import block_length
from mhc_jax.remat_plan import resolve


def estimate(config: ExperimentConfig, where: Slice, implementation: str | None) -> dict[str, Any]:
    """Compile the train step and say what it costs.

    Args:
      config: its model.vocab_size is set, and its mesh has all devices of the slice.
      where: the slice.
      implementation: of the connections' operations; None: the one of the platform.

    Returns:
      JSON values.  Bytes and FLOPs are those of one device, times are seconds.  A step that does not fit has no costs.

    Raises:
      InputError: the mesh does not fit the slice, or the vocabulary is not known.
    """
    require(config.model.vocab_size > 0, "model.vocab_size is 0, the tokenizer's; set --config.model.vocab_size=...")
    began = time.monotonic()
    config, _ = resolve(config)
    step = lower(config, where, implementation)
    row: dict[str, Any] = {
        "connection": connections.spec(config.model.connection),
        "tokens": config.data.batch_size * config.data.sequence_length,
        "by_shape": by_shape(config, step.state),
    }
    try:
        compiled = compile_lowered(step.lowered)
    except DoesNotFitError as error:
        row |= {"fits": False, "needs": error.needs, "hbm": error.has or where.chip.hbm, "message": str(error)[:4000]}
        return row | {"compile_s": round(time.monotonic() - began, 1)}
    memory, program = counts.memory_parts(compiled), Program(compiled.as_text())
    assert memory is not None
    row |= {"compile_s": round(time.monotonic() - began, 1), "memory": memory, "needs": memory["total"]}
    row |= {"hbm": where.chip.hbm, "fits": memory["total"] <= where.chip.hbm, "fusions": hlo.fusions(program.text)}
    return row | _costs(Prices(config, where, step.mesh), program)


def _costs(prices: Prices, program: Program) -> dict[str, Any]:
    """Work, kernels, collectives, seconds and MFU of a compiled step."""
    config, where = prices.config, prices.where
    row: dict[str, Any] = {}
    wait = 0.0
    if (schedule := schedule_of(config)) is not None:
        pipeline = CompiledPipeline(program, schedule, config.model.num_leading > 0)
        blocks = config.model.num_layers // schedule.stages
        row["pipeline"] = pipeline.describe(prices.seconds, where.chip.link, blocks)
        program, wait = pipeline.weighted(), row["pipeline"]["bubble"]
    row |= {"flops": prices.flops(program), "bytes": hlo.bytes_accessed(program)}
    row["kernels"] = prices.kernels(program)
    compute, collectives = prices.compute_seconds(program), prices.collectives(program)
    row["cycles"] = compute * where.chip.clock
    row["collectives"] = [
        dataclasses.asdict(collective) | {"group": len(collective.group), "seconds": seconds}
        for collective, seconds in collectives
    ]
    shown = sum(seconds for _, seconds in collectives)
    row["seconds"] = {"compute": compute, "collectives": shown, "waiting": wait, "step": compute + shown + wait}
    T, devices = config.data.sequence_length, config.mesh.size
    work = counts.model_cost(config.model, T).training_flops * (config.data.batch_size * T)
    peak = where.chip.flops * devices
    row["mfu"] = work / peak / (compute + shown + wait)
    row["mfu, collectives hidden"] = work / peak / (max(compute, shown) + wait)
    row["flops over model_cost"] = row["flops"] * devices / work
    return row


def by_shape(config: ExperimentConfig, state: Any) -> dict[str, int]:
    """Bytes on one device that the step must hold whatever the compiler does, from shapes and shardings.

    `streams` are those kept for the backward pass: of every sub-layer, of every block (`full`), or of every L_r-th sub-layer
    (`connection`).  In a pipeline they are those of as many microbatches and stages as its schedule keeps.

    Args:
      config: of the run.
      state: shapes of the train state with shardings.
    """
    model, mesh, data = config.model, config.mesh, config.data
    micro = data.batch_size // config.optimizer.accumulation_steps
    tokens = micro * data.sequence_length // (mesh.batch * mesh.sequence)
    L, streams = model.num_sublayers, counts.carry_shapes(model, 1)[0]
    carried = sum(leaf.size for leaf in jax.tree.leaves(streams)) * jnp.dtype(model.stream_dtype).itemsize
    kept = {"none": L, "full": model.num_layers}.get(model.remat_policy) or math.ceil(L / block_length(model, streams))
    schedule = schedule_of(config)
    share = 1.0 if schedule is None else max(schedule.bound) / schedule.stages
    vocabulary = model.vocab_size // (mesh.tensor if model.vocab_size % mesh.tensor == 0 else 1)
    return {
        "parameters": _shard_bytes(state.params),
        "optimizer state": _shard_bytes(state.opt_state),
        "gradients": _shard_bytes(state.params),
        "streams": int(tokens * carried * kept * share),
        "logits": tokens * vocabulary * 4,
    }


def _shard_bytes(tree: Any) -> int:
    """Bytes on one device of shapes with shardings."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# -- prices


@dataclass(frozen=True)
class Prices:
    """Prices of the parts of a train step that is compiled for a slice."""

    config: ExperimentConfig
    where: Slice
    mesh: Any
    """`jax.sharding.Mesh`, or None for one device."""

    def flops(self, part: Program) -> float:
        """FLOPs of one run, kernels included."""
        return hlo.flops(part, lambda kernel: (kernel_cost(self.config, kernel) or (0.0, 0.0))[0])

    def compute_seconds(self, part: Program) -> float:
        """Seconds of one run without its collectives."""
        chip = self.where.chip
        if self.where.platform == "tpu":
            cycles = hlo.cycles(part, lambda kernel: kernel_cycles(chip, kernel_cost(self.config, kernel)))
        else:
            cycles = max(chip.flops_cycles(self.flops(part)), chip.bytes_cycles(hlo.bytes_accessed(part)))
        return cycles / chip.clock

    def collectives(self, part: Program) -> list[tuple[Collective, float]]:
        """Collectives of one run, and the seconds that all runs of each take.

        Messages of a pipeline are left out: they hide behind operations, or devices wait for them, which the simulation counts.
        """
        if self.mesh is None:
            return []
        return [
            (collective, collective.count * collective_seconds(collective, self.where, self.mesh))
            for collective in hlo.collectives(part, dict(self.mesh.shape))
            if (collective.kind, collective.axes) != ("collective-permute", "stage")
        ]

    def seconds(self, part: Program) -> float:
        """Seconds of one run."""
        return self.compute_seconds(part) + sum(seconds for _, seconds in self.collectives(part))

    def kernels(self, part: Program) -> dict[str, int | float]:
        """How often each Pallas kernel runs, by its name; `(no estimate)` marks those that count as no time."""
        times_of: dict[str, int | float] = {}
        for instruction, _, times in part.walk():
            if hlo.KERNEL in instruction.line:
                note = "" if kernel_cost(self.config, instruction) else " (no estimate)"
                name = re.sub(r"\.\d+$", "", instruction.name) + note
                times_of[name] = times_of.get(name, 0) + times
        return times_of


def kernel_cost(config: ExperimentConfig, kernel: Instruction) -> tuple[float, float] | None:
    """(FLOPs, bytes) of a Pallas kernel in the train step of one device; None: nothing is known of it.

    JAX's splash attention carries no estimate.  It computes two products forward and five backward, over half of T x T.
    """
    if known := hlo.kernel_estimate(kernel):
        return known
    model, T, mesh = config.model, config.data.sequence_length, config.mesh
    if splash := re.search(r"splash_m[qh]a_(fwd|dkv|dq)", kernel.name):
        sequences = config.data.batch_size / config.optimizer.accumulation_steps / mesh.batch
        keys, values = model.key_width, model.head_dim
        widths = {"fwd": keys + values, "dkv": 3 * keys + 2 * values, "dq": 2 * keys + values}[splash[1]]
        return sequences * T * T * model.num_heads / mesh.tensor * widths, 0.0
    return None


def kernel_cycles(chip: Chip, cost: tuple[float, float] | None) -> float:
    """Cycles of a kernel: the longer of its FLOPs and its bytes at their peaks; 0 where nothing is known of it."""
    return max(chip.flops_cycles(cost[0]), chip.bytes_cycles(cost[1])) if cost else 0.0


def collective_seconds(collective: Collective, where: Slice, mesh: Any) -> float:
    """Seconds of one run of a collective.

    It runs on rings along every side of the torus that its group spans.  An all-to-all is bounded by the links across the middle of
    the longest side, s devices long, of its group: through a ring s bytes / 8 cross it each way, through a line twice as many.
    """
    places = np.array([where.coordinates(mesh.devices.flat[k]) for k in collective.group])
    spans = tuple(len(set(column)) for column in places.T.tolist())
    longest = max(range(len(spans)), key=lambda k: spans[k])
    if spans[longest] == 1:  # the two cores of a chip
        return collective.wire_bytes / where.chip.bandwidth
    if collective.kind.endswith("all-to-all"):
        ring = where.sides[longest] % where.chip.whole == 0
        return collective.bytes * spans[longest] / ((8 if ring else 4) * where.chip.link)
    return collective.wire_bytes / where.bandwidth(spans)
