"""Settings of a run, as frozen dataclasses that check their values.  `config.mapping` converts them to plain mappings and back."""

from mhc_jax.config.mesh import AXES, MeshConfig, PipelineConfig
from mhc_jax.config.model import ModelConfig
from mhc_jax.config.run import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig

__all__ = [
    "AXES",
    "DataConfig",
    "ExperimentConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "TrainConfig",
]
