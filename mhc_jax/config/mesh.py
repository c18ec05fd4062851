"""Settings of the mesh of devices and of the pipeline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mhc_jax.errors import at_least, require, shown
from mhc_jax.pipeline_schedules.tables import DEFAULT_CHUNKS, SCHEDULES
from mhc_jax.settings_text import read_number

MOST_CHUNKS = 1024
"""Largest number of stages of a pipeline that one device may hold."""


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh, at least 1.  If all are 1, the run uses one device and no mesh."""

    stage: int = 1
    """Number of devices of the pipeline, which share the blocks.  A training step has optimizer.accumulation_steps microbatches."""
    data: int = 1
    """Number of devices that split the batch, and between uses the matrices and their optimizer state (data parallelism).

    A step gathers each matrix over them once.  Over `fsdp` it gathers a parameter whenever a block needs it."""
    fsdp: int = 1
    """Number of devices that split the batch, the parameters and the optimizer's state (fully sharded data parallelism)."""
    tensor: int = 1
    """Number of devices that split attention heads and hidden channels, and the vocabulary if it divides model.vocab_size."""
    expert: int = 1
    """Number of devices that split both the batch and the experts (expert parallelism)."""
    sequence: int = 1
    """Number of devices that split the tokens of each sequence.  If it is above 1, model.attention must be `xla`."""

    def __post_init__(self) -> None:
        at_least(1, self, "mesh.", *AXES)

    @property
    def size(self) -> int:
        """Number of devices of the whole mesh."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def batch(self) -> int:
        """Number of parts into which the mesh splits the batch."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        """Return the axes with more than one device, as in `data 2, fsdp 4`, or `1 device` if there are none."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


@dataclass(frozen=True)
class PipelineConfig:
    """Settings of the pipeline, which mesh.stage devices form.  They have no effect if mesh.stage is 1."""

    schedule: str = "1f1b"
    """Name of the schedule: `gpipe`, `1f1b`, `interleaved`, `zb1p`, `dualpipe` or `dualpipev`.  Their rules and bubbles are in
    `mhc_jax/pipeline_schedules/tables.py`.

    `interleaved:4` gives each device 4 stages instead of 2."""
    overlap: bool = False
    """Whether messages travel while the devices compute the next tick.  False: they travel between two ticks.

    With overlap a schedule takes more ticks, because a message arrives one tick later."""

    def __post_init__(self) -> None:
        name, chunks = self._read()
        require(
            chunks is None or 2 <= chunks <= MOST_CHUNKS,
            f"pipeline.schedule is {shown(self.schedule)}; a device holds at least 2 stages and at most {MOST_CHUNKS}, or use "
            "'1f1b'.",
        )
        if chunks == DEFAULT_CHUNKS[name]:
            object.__setattr__(self, "schedule", name)

    @property
    def schedule_name(self) -> str:
        """Name of the schedule without the number that may follow it: `interleaved` for `interleaved:4`."""
        return self._read()[0]

    @property
    def chunks(self) -> int:
        """Number of stages that each device holds, as `schedule` gives it; 0: the default of the schedule."""
        return self._read()[1] or 0

    def _read(self) -> tuple[str, int | None]:
        return read_number("pipeline.schedule", self.schedule, SCHEDULES, {"interleaved": int})
