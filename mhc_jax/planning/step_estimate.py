r"""The memory, work and time of a train step on a slice of TPUs, estimated from array shapes and the compiled program.

The memory is the compiler's report.  The time of a step on one device is an upper estimate:

$$t = t_{compute} + t_{collectives} + t_{wait}$$

$t_{compute}$ is the compiler's estimate of cycles, divided by the chip's clock.  The compiler gives no cycles for a Pallas kernel.
Its time is that of its FLOPs or that of its bytes at the chip's peaks, whichever is longer.  $t_{collectives}$ is the time in which
all collectives send their bytes over the links of the torus (`Slice.bandwidth`), as if nothing else ran meanwhile.  $t_{wait}$ is
the longest time that a device of the pipeline waits in a simulation, and 0 without a pipeline.
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
from mhc_jax.model import loss_parts
from mhc_jax.pipeline.executor import schedule_of
from mhc_jax.planning.compile_ahead import DoesNotFitError, compile_lowered, lower
from mhc_jax.planning.compiled_pipeline import CompiledPipeline
from mhc_jax.planning.slices import Chip, Slice
from mhc_jax.remat import block_length
from mhc_jax.remat_plan import resolve


def estimate(config: ExperimentConfig, where: Slice, implementation: str | None) -> dict[str, Any]:
    """Compile the train step of a configuration and estimate its memory, work and time.

    Args:
      config: the configuration, with model.vocab_size set and a mesh of all devices of the slice.
      where: the slice to compile for.
      implementation: name of the implementation of the connections' operations.  None takes the platform's default.

    Returns:
      JSON values by name.  Bytes and FLOPs are those of one device, and times are in seconds.  If the compiler reports that the
      step does not fit into memory, its work and times are missing.

    Raises:
      InputError: the mesh does not fit the slice, or the vocabulary is not known.
    """
    config.model.require_resolved()
    began = time.monotonic()
    config, _ = resolve(config)
    step = lower(config, where, implementation)
    row: dict[str, Any] = {
        "connection": connections.spec(config.model.connection),
        "tokens": config.data.batch_size * config.data.sequence_length,
        "remat": config.model.remat,
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
    """Return the work, kernels, collectives, seconds and MFU of a compiled train step as JSON values by name."""
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
    """Return the bytes of arrays that a step holds on one device however it is compiled, from their shapes and shardings.

    `streams` are the streams that are kept for the backward pass.  With model.remat `none` they are those of every sub-layer, with
    `full` those of every block, and with `connection` those of every L_r-th sub-layer (`remat.block_length`).  In a pipeline they
    are those of the largest number of activations that a device may hold (`Schedule.bound`).  `logits` are those that the loss
    makes at once (`model.mean_loss`).

    Args:
      config: the configuration of the run.
      state: shapes of the train state, with their shardings.
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
        "logits": tokens * vocabulary * 4 // (loss_parts(tokens, model.vocab_size) if schedule is None else 1),
    }


def _shard_bytes(tree: Any) -> int:
    """Return the bytes that arrays of these shapes and shardings take on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# -- prices of the parts of a step


@dataclass(frozen=True)
class Prices:
    """Computes the FLOPs, seconds and kernels of parts of a train step that is compiled for a slice."""

    config: ExperimentConfig
    where: Slice
    mesh: Any
    """The `jax.sharding.Mesh` of the step, or None for one device."""

    def flops(self, part: Program) -> float:
        """Return the FLOPs of one run of a part of the step, Pallas kernels included."""
        return hlo.flops(part, lambda kernel: (kernel_cost(self.config, kernel) or (0.0, 0.0))[0])

    def compute_seconds(self, part: Program) -> float:
        """Return the seconds of one run of a part of the step, without its collectives."""
        chip = self.where.chip
        if self.where.platform == "tpu":
            cycles = hlo.cycles(part, lambda kernel: kernel_cycles(chip, kernel_cost(self.config, kernel)))
        else:
            cycles = max(chip.flops_cycles(self.flops(part)), chip.bytes_cycles(hlo.bytes_accessed(part)))
        return cycles / chip.clock

    def collectives(self, part: Program) -> list[tuple[Collective, float]]:
        """List the collectives of one run of a part of the step, each with the seconds of all its repetitions.

        Messages of a pipeline are left out, because the simulation of the pipeline counts how long devices wait for them.
        """
        if self.mesh is None:
            return []
        return [
            (collective, collective.count * collective_seconds(collective, self.where, self.mesh))
            for collective in hlo.collectives(part, dict(self.mesh.shape))
            if (collective.kind, collective.axes) != ("collective-permute", "stage")
        ]

    def seconds(self, part: Program) -> float:
        """Return the seconds of one run of a part of the step, collectives included."""
        return self.compute_seconds(part) + sum(seconds for _, seconds in self.collectives(part))

    def kernels(self, part: Program) -> dict[str, int | float]:
        """Return how often each Pallas kernel runs, by name.  `(no estimate)` after a name means that its time counts as 0."""
        times_of: dict[str, int | float] = {}
        for instruction, _, times in part.walk():
            if hlo.KERNEL in instruction.line:
                note = "" if kernel_cost(self.config, instruction) else " (no estimate)"
                name = re.sub(r"\.\d+$", "", instruction.name) + note
                times_of[name] = times_of.get(name, 0) + times
        return times_of


def kernel_cost(config: ExperimentConfig, kernel: Instruction) -> tuple[float, float] | None:
    """Return (FLOPs, bytes) of a Pallas kernel in the train step of one device, or None if they are not known.

    JAX's splash attention states no costs.  Its FLOPs are those of two matrix products in the forward kernel and of five in the
    backward kernel, over half of the T x T scores.  Its bytes count as 0.
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
    """Return the larger of the cycles of a kernel's FLOPs and of its bytes at the chip's peaks.  If `cost` is None return 0."""
    return max(chip.flops_cycles(cost[0]), chip.bytes_cycles(cost[1])) if cost else 0.0


def collective_seconds(collective: Collective, where: Slice, mesh: Any) -> float:
    """Return the seconds of one run of a collective.

    A collective sends its bytes along every side of the torus that its group spans.  An all-to-all is limited by the links across
    the middle of the longest side of its group, which is s chips long.  If every device has an array of b bytes, each link
    carries s b / 8 bytes each way if the side is a ring, and twice as many if the side is a line.
    """
    places = np.array([where.coordinates(mesh.devices.flat[k]) for k in collective.group])
    spans = tuple(len(set(column)) for column in places.T.tolist())
    longest = max(range(len(spans)), key=lambda k: spans[k])
    # If the devices span one chip only, they are its two cores, which exchange arrays through the chip's memory.
    if spans[longest] == 1:
        return collective.wire_bytes / where.chip.bandwidth
    if collective.kind.endswith("all-to-all"):
        ring = where.sides[longest] % where.chip.whole == 0
        return collective.bytes * spans[longest] / ((8 if ring else 4) * where.chip.link)
    return collective.wire_bytes / where.bandwidth(spans)
