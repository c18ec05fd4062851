"""Settings of the mesh of devices and of the pipeline, and what they ask of the other settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_jax.errors import one_of, require
from mhc_jax.schedules.tables import SCHEDULES, make, stage_count

if TYPE_CHECKING:
    from mhc_jax.config.run import ExperimentConfig


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; all 1: one device, and no mesh."""

    stage: int = 1
    """Devices that share the blocks as a pipeline; optimizer.accumulation_steps are its microbatches."""
    data: int = 1
    """Copies of the model."""
    fsdp: int = 1
    """Devices that split the batch, and parameters and optimizer state."""
    tensor: int = 1
    """Devices that split heads, hidden channels and (where it divides) the vocabulary."""
    expert: int = 1
    """Devices that split the batch, and the experts."""
    sequence: int = 1
    """Devices that split each sequence; model.attention 'xla' only."""

    def __post_init__(self) -> None:
        for axis in AXES:
            value = getattr(self, axis)
            require(value >= 1, f"mesh.{axis} is {value}; it must be at least 1.")

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def batch(self) -> int:
        """Parts of the batch."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        """`data 2, fsdp 4`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages of mesh.stage work together; without them nothing."""

    schedule: str = "1f1b"
    """`gpipe`, `1f1b`, `interleaved`, `zb1p`, `dualpipe` or `dualpipev` (`mhc_jax/schedules/tables.py`)."""
    chunks: int = 0
    """`interleaved` only: stages a device holds; 0: the schedule's own number."""
    overlap: bool = False
    """Boundary tensors travel while the next tick computes, instead of between two ticks; a schedule then takes more ticks."""

    def __post_init__(self) -> None:
        one_of("pipeline.schedule", self.schedule, SCHEDULES)
        require(self.chunks >= 0, f"pipeline.chunks is {self.chunks}; use 0 for the schedule's own number.")


def check_dimensions(config: ExperimentConfig) -> None:
    """Raise `InputError` where an axis of `config.mesh` does not divide what it splits.

    The vocabulary is the exception: where tensor does not divide it, it is not split; model.vocab_size may be set to a multiple.
    """
    mesh, model, data = config.mesh, config.model, config.data
    micro = data.batch_size // config.optimizer.accumulation_steps
    require(
        micro % mesh.batch == 0,
        f"data.batch_size / optimizer.accumulation_steps is {micro}, which mesh.data x mesh.fsdp x mesh.expert = {mesh.batch} "
        f"does not divide; use a multiple.",
    )
    if mesh.stage > 1:
        _check_stages(config)
    split = [("data.sequence_length", data.sequence_length, "sequence"), ("model.width", model.width, "fsdp")]
    split += [("model.num_heads", model.num_heads, "tensor")]
    if model.attention_kind == "gqa":
        split += [("model.num_kv_heads", model.num_kv_heads, "tensor")]
    if not model.num_experts or model.num_leading:
        split += [("model.mlp_width", model.mlp_width, "tensor")]
    if model.num_experts:
        split += [
            ("model.num_experts", model.num_experts, "expert"),
            ("model.expert_width", model.expert_width, "tensor"),
        ]
    for name, size, axis in split:
        parts = getattr(mesh, axis)
        require(size % parts == 0, f"{name} is {size}, which mesh.{axis} {parts} does not divide; change one of them.")
    require(
        mesh.sequence == 1 or model.attention == "xla",
        f"mesh.sequence is {mesh.sequence} and model.attention {model.attention!r}, which needs whole sequences; use 'xla'.",
    )


def _check_stages(config: ExperimentConfig) -> None:
    mesh, model, pipeline = config.mesh, config.model, config.pipeline
    make(pipeline.schedule, mesh.stage, config.optimizer.accumulation_steps, pipeline.chunks)
    stages = stage_count(pipeline.schedule, mesh.stage, pipeline.chunks)
    require(
        model.num_layers % stages == 0,
        f"model.num_layers is {model.num_layers}, which does not divide into the {stages} stages of {pipeline.schedule!r} with "
        f"mesh.stage {mesh.stage}; use a multiple of {stages}.",
    )
    require(
        model.num_leading <= model.num_layers // stages,
        f"model.num_dense_layers is {model.num_leading}, more than the {model.num_layers // stages} blocks of the first stage.",
    )
