"""Settings of the mesh of devices and of the pipeline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mhc_jax.errors import at_least, require
from mhc_jax.schedules.tables import DEFAULT_CHUNKS, SCHEDULES
from mhc_jax.spelling import read_number


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh, at least 1; where all are 1 there is one device, and no mesh."""

    stage: int = 1
    """Devices that share the blocks as a pipeline; it has optimizer.accumulation_steps microbatches."""
    data: int = 1
    """Copies of the model, which split the batch."""
    fsdp: int = 1
    """Devices that split the batch, the parameters and the state of the optimizer."""
    tensor: int = 1
    """Devices that split heads, hidden channels and, where it divides the vocabulary, that too."""
    expert: int = 1
    """Devices that split the batch and the experts."""
    sequence: int = 1
    """Devices that split each sequence; model.attention must be `xla`."""

    def __post_init__(self) -> None:
        at_least(1, self, "mesh.", *AXES)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def batch(self) -> int:
        """Number of parts that the batch is split into."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        """The axes that are split, as in `data 2, fsdp 4`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages of mesh.stage work together; without stages these settings have no effect."""

    schedule: str = "1f1b"
    """`gpipe`, `1f1b`, `interleaved`, `zb1p`, `dualpipe` or `dualpipev` (`mhc_jax/schedules/tables.py`).

    `interleaved:4` gives each device 4 stages instead of 2."""
    overlap: bool = False
    """Boundary tensors travel while the next tick computes, instead of between two ticks; a schedule then takes more ticks."""

    def __post_init__(self) -> None:
        name, chunks = self._read()
        require(
            chunks is None or chunks >= 2,
            f"pipeline.schedule is {self.schedule!r}; a device holds at least 2 stages, or use '1f1b'.",
        )
        if chunks == DEFAULT_CHUNKS[name]:
            object.__setattr__(self, "schedule", name)

    @property
    def schedule_name(self) -> str:
        """The schedule without the number of stages."""
        return self._read()[0]

    @property
    def chunks(self) -> int:
        """Stages of the model that a device holds; 0: the schedule's own number."""
        return self._read()[1] or 0

    def _read(self) -> tuple[str, int | None]:
        return read_number("pipeline.schedule", self.schedule, SCHEDULES, {"interleaved": int})
