"""Settings of the mesh of devices and of the pipeline, and the checks that they fit the other settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_jax.errors import at_least, require
from mhc_jax.schedules.tables import DEFAULT_CHUNKS, SCHEDULES, make, stage_count
from mhc_jax.spelling import read_number

if TYPE_CHECKING:
    from mhc_jax.config.run import ExperimentConfig


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
    if not model.uses_mla:
        split += [("model.num_kv_heads", model.num_kv_heads, "tensor")]
    if not model.num_experts or model.num_leading:
        split += [("model.mlp_width", model.mlp_width, "tensor")]
    if model.num_experts:
        split += [
            ("The number of experts in model.experts", model.num_experts, "expert"),
            ("model.experts: width", model.expert_width, "tensor"),
        ]
    for name, size, axis in split:
        parts = getattr(mesh, axis)
        require(size % parts == 0, f"{name} is {size}, which mesh.{axis} {parts} does not divide; change one of them.")
    require(
        mesh.sequence == 1 or model.attention == "xla",
        f"mesh.sequence is {mesh.sequence} and model.attention {model.attention!r}, which needs whole sequences; use 'xla'.",
    )
    require(
        model.attention != "splash" or fits_splash(config),
        f"model.attention is 'splash', which needs data.sequence_length and model.head_width that are multiples of 128 and keys "
        f"that are multiples of 64, not {data.sequence_length}, {model.head_dim} and {model.key_width}; use 'xla'.",
    )


def fits_splash(config: ExperimentConfig) -> bool:
    """JAX's flash attention for TPUs takes these sizes: sequences and values in multiples of 128, keys in multiples of 64."""
    model = config.model
    return config.data.sequence_length % 128 == 0 and model.head_dim % 128 == 0 and model.key_width % 64 == 0


def _check_stages(config: ExperimentConfig) -> None:
    mesh, model, pipeline = config.mesh, config.model, config.pipeline
    make(pipeline.schedule_name, mesh.stage, config.optimizer.accumulation_steps, pipeline.chunks)
    stages = stage_count(pipeline.schedule_name, mesh.stage, pipeline.chunks)
    require(
        model.num_layers % stages == 0,
        f"model.num_layers is {model.num_layers}, which does not divide into the {stages} stages of {pipeline.schedule!r} with "
        f"mesh.stage {mesh.stage}; use a multiple of {stages}.",
    )
    require(
        model.num_leading <= model.num_layers // stages,
        f"model.experts: dense_layers is {model.num_leading}, more than the {model.num_layers // stages} blocks of the first "
        "stage.",
    )
