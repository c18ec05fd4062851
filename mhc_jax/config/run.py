"""Settings of a run: text, optimizer, loop, and all sections together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mhc_jax.config.mesh import MeshConfig, PipelineConfig, check_dimensions
from mhc_jax.config.model import ModelConfig
from mhc_jax.errors import one_of, require

SCHEDULES = ("constant", "cosine", "step", "wsd")


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and the shape of a batch."""

    source: str = "shakespeare"
    """`shakespeare` (embedded), `tfds:<name>[/<config>]`, or a path or glob of .txt / .jsonl[.gz|.zst] / .parquet files."""
    validation_source: str = ""
    """Held-out text in the same notation; empty: documents of `source` set apart by the hash of their text."""
    validation_fraction: float = 0.05
    """Share of documents set apart when `validation_source` is empty and the source has no validation split."""
    tokenizer: str = "byte"
    """`byte`, `gpt2`, `gpt2:<folder of encoder.json and vocab.bpe>` or `bpe:<tokenizer.json>`."""
    sequence_length: int = 256
    """T."""
    batch_size: int = 8
    """B: sequences an optimizer step, over all accumulation steps."""
    seed: int = 0
    """Of the window order."""
    cache_dir: str = ""
    """Pre-tokenized arrays; empty: $MHC_JAX_CACHE, else ~/.cache/mhc_jax."""

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, f"data.sequence_length is {self.sequence_length}; it must be at least 2.")
        require(self.seed >= 0, f"data.seed is {self.seed}; it must not be negative.")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; it must be at least 1.")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
        require(bool(self.source), "data.source is empty; use 'shakespeare', 'tfds:<name>' or a path.")
        require(
            self.tokenizer in ("byte", "gpt2") or self.tokenizer.startswith(("bpe:", "gpt2:")),
            f"data.tokenizer is {self.tokenizer!r}; it must be 'byte', 'gpt2' or 'bpe:<tokenizer.json>'.",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule (mHC Table 5 defaults where they do not depend on size)."""

    learning_rate: float = 3e-3
    schedule: str = "cosine"
    """`constant`, `cosine`, `step` (x0.316 after 80 %, x0.1 after 90 %) or `wsd` (linear over the last 20 %): `optim.schedule`."""
    warmup_steps: int = 20
    final_fraction: float = 0.1
    """Learning rate of the last step of `cosine` and `wsd`, as a share of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    accumulation_steps: int = 1
    connection_lr_multiplier: float = 1.0
    """Learning rate of the connections' own parameters, relative to the rest."""
    decay_static: bool = False
    """Weight decay on the static parts of connections too; the papers do not."""

    def __post_init__(self) -> None:
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        require(
            0 < self.learning_rate < float("inf"),
            f"optimizer.learning_rate is {self.learning_rate}; it must be above 0.",
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must not be negative.")
        require(
            0 <= self.final_fraction <= 1, f"optimizer.final_fraction is {self.final_fraction}; it must lie in [0, 1]."
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must lie in [0, 1).")
        require(self.grad_clip >= 0, f"optimizer.grad_clip is {self.grad_clip}; use 0 to switch clipping off.")
        require(self.eps >= 0, f"optimizer.eps is {self.eps}; it must not be negative.")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        require(
            self.accumulation_steps >= 1,
            f"optimizer.accumulation_steps is {self.accumulation_steps}; it must be at least 1.",
        )
        require(
            self.connection_lr_multiplier >= 0,
            f"optimizer.connection_lr_multiplier is {self.connection_lr_multiplier}; it must not be negative.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, where."""

    steps: int = 200
    seed: int = 0
    """Of parameters; branches get the same values whatever the connection."""
    log_every: int = 10
    validate_every: int = 50
    """0: only at the end."""
    validation_batches: int = 8
    checkpoint_every: int = 100
    """0: only at the end."""
    keep_checkpoints: int = 2
    diagnostics_every: int = 50
    """0: off; the ordinary train step is the same program either way."""
    diagnostics_tokens: int = 64
    """Tokens sampled from one sequence for per-token gains."""
    spike_window: int = 50
    """Steps of the rolling median that a loss spike is measured against."""
    spike_threshold: float = 0.5
    """Nats above the rolling median that count as a spike."""
    divergence_loss: float = 0.0
    """Stop when the loss exceeds this many nats; 0: only NaN and infinity stop a run."""
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "log_every",
            "keep_checkpoints",
            "validation_batches",
            "diagnostics_tokens",
            "spike_window",
        ):
            value = getattr(self, name)
            require(value >= 1, f"train.{name} is {value}; it must be at least 1.")
        for name in ("seed", "validate_every", "checkpoint_every", "diagnostics_every", "divergence_loss"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} is {value}; it must not be negative.")
        require(self.spike_threshold > 0, f"train.spike_threshold is {self.spike_threshold}; it must be above 0.")


@dataclass(frozen=True)
class ExperimentConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self) -> None:
        require(
            self.data.batch_size % self.optimizer.accumulation_steps == 0,
            f"data.batch_size is {self.data.batch_size}, which optimizer.accumulation_steps "
            f"{self.optimizer.accumulation_steps} does not divide.",
        )
        require(
            self.optimizer.warmup_steps <= self.train.steps,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, more than train.steps {self.train.steps}.",
        )
        check_dimensions(self)

    def with_settings(self, **sections: Mapping[str, Any]) -> ExperimentConfig:
        """Copy the configuration with some settings changed: `config.with_settings(model={"width": 64}, data={"seed": 1})`.

        Raises:
          InputError: the settings do not fit together.
        """
        changed = {name: replace(getattr(self, name), **settings) for name, settings in sections.items()}
        return replace(self, **changed)
