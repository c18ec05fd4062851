"""Settings of the data, the optimizer and the training loop, and the class that holds all settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mhc_jax.config.compound import Muon, read_optimizer, read_tracker
from mhc_jax.config.mesh import MeshConfig, PipelineConfig
from mhc_jax.config.model import ModelConfig
from mhc_jax.errors import at_least, check_seed, finite, one_of, require
from mhc_jax.pipeline_schedules.tables import make, stage_count

SCHEDULES = ("constant", "cosine", "step", "wsd")
INIT_STATES = ("parameters", "all")


@dataclass(frozen=True)
class DataConfig:
    """Settings of the text, the tokenizer and the shape of a batch.

    Tokenized texts are kept in the folder $MHC_JAX_CACHE, or in ~/.cache/mhc_jax if this variable is not set.
    """

    source: str = "shakespeare"
    """Training text: a file, folder or glob of .txt / .jsonl[.gz|.zst] / .parquet files, or one of the following.

    - `shakespeare`: a text that comes with this package.
    - `tfds:<name>[/<config>]`: a prepared set of TensorFlow Datasets.
    - `<file>.py:<function>`: a function of your own (`docs/your_data.md`)."""
    validation_source: str = ""
    """Held-out text, in the notation of `source`.

    Empty: the validation split of `source`, or, without such a split, documents of `source` chosen by the hash of their text."""
    validation_fraction: float = 0.05
    """Share of the documents of `source` that are held out for validation, between 0 and 1.

    It has no effect if `validation_source` is given or `source` has a validation split."""
    tokenizer: str = "byte"
    """Tokenizer: `byte`, `gpt2`, `gpt2:<folder of encoder.json and vocab.bpe>`, `bpe:<tokenizer.json>` or `hf:<folder>`.

    The folder of `hf` is that of a Hugging Face model, with tokenizer.json and tokenizer_config.json."""
    sequence_length: int = 256
    """T, the number of tokens of a sequence; at least 2."""
    batch_size: int = 8
    """B, the number of sequences in one step of the optimizer, summed over its accumulation steps; at least 1."""
    seed: int = 0
    """Seed of the order in which training sequences are read, between 0 and 2^32 - 1."""

    def __post_init__(self) -> None:
        finite(self, "data.")
        at_least(2, self, "data.", "sequence_length")
        at_least(1, self, "data.", "batch_size")
        check_seed("data.seed", self.seed)
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
        require(bool(self.source), "data.source is empty; use 'shakespeare', 'tfds:<name>' or a path.")
        require(
            self.tokenizer in ("byte", "gpt2") or self.tokenizer.startswith(("bpe:", "gpt2:", "hf:")),
            f"data.tokenizer is {self.tokenizer!r}; it must be 'byte', 'gpt2', 'bpe:<tokenizer.json>' or 'hf:<folder>'.",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer and of its learning rate.  Defaults that do not depend on the model's size are from mHC Table 5.

    Norms, biases of routers and the static parameters of connections take no weight decay (`optim.groups`).
    """

    name: str = "adamw"
    """Rule that makes a direction of the gradient.

    - `adamw`: AdamW (arXiv 1711.05101).
    - `muon`, or with settings `muon:rms=0.2` (`compound.Muon`): Muon for matrices, AdamW for everything else (`optim.groups`).
    - `lion`: Lion (arXiv 2302.06675).
    - `sgd`: the gradient with momentum b1.
    - `<file>.py:<function>`: a function of your own, from these settings to a transformation of optax."""
    connections: str = "same"
    """Rule for the parameters of connections: `same` as for other parameters, or `adamw`."""
    learning_rate: float = 3e-3
    """Largest learning rate, which is reached at the end of the warm-up; above 0."""
    schedule: str = "cosine"
    """Name of the learning-rate schedule after the warm-up (`optim.schedule`): `constant`, `cosine`, `step` or `wsd`.

    `step`: 0.316 of the peak after 80 % of the steps, 0.1 after 90 %.  `wsd`: constant, then a linear fall over the last 20 %."""
    warmup_steps: int = 20
    """Number of steps in which the learning rate grows linearly to its peak; at most train.steps."""
    final_fraction: float = 0.1
    """Learning rate at the end of the schedules `cosine` and `wsd`, as a share of the peak; between 0 and 1."""
    b1: float = 0.9
    """Decay of the running mean of gradients of AdamW, Lion and sgd, in [0, 1)."""
    b2: float = 0.95
    """Decay of AdamW's running mean of squared gradients, and of Lion's second mean, in [0, 1)."""
    eps: float = 1e-20
    """Number that AdamW adds to the root of the running mean of squared gradients; not negative."""
    weight_decay: float = 0.1
    """Weight decay: an update subtracts weight_decay x learning rate x parameter; not negative."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient: a larger gradient is scaled down to it; 0: no clipping.

    Infinity becomes 0, because both mean the same."""
    accumulation_steps: int = 1
    """Number of slices into which a batch is cut, a divisor of data.batch_size.

    The gradients of the slices are computed one after another and averaged.  If mesh.stage is above 1, the slices are the
    microbatches of the pipeline."""
    connection_lr_multiplier: float = 1.0
    """Learning rate of the connections' parameters, as a multiple of `learning_rate`; not negative."""

    @property
    def rule(self) -> str:
        """The part of `name` before its settings: `adamw`, `muon`, `lion`, `sgd`, or the whole name of a function."""
        return read_optimizer(self.name)[0]

    @property
    def muon(self) -> Muon:
        """Settings of Muon in `name`."""
        return read_optimizer(self.name)[1]

    def __post_init__(self) -> None:
        if self.grad_clip == float("inf"):
            object.__setattr__(self, "grad_clip", 0.0)
        finite(self, "optimizer.")
        read_optimizer(self.name)
        one_of("optimizer.connections", self.connections, ("same", "adamw"))
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate is {self.learning_rate}; it must be above 0.",
        )
        at_least(1, self, "optimizer.", "accumulation_steps")
        at_least(0, self, "optimizer.", "warmup_steps", "grad_clip", "eps", "weight_decay", "connection_lr_multiplier")
        require(
            0 <= self.final_fraction <= 1, f"optimizer.final_fraction is {self.final_fraction}; it must lie in [0, 1]."
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must lie in [0, 1).")


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run, and how often it logs, validates, saves and measures."""

    steps: int = 200
    """Number of updates of the optimizer, at least 1."""
    seed: int = 0
    """Seed of the initial parameters, between 0 and 2^32 - 1.

    Under one seed, branches start with the same values for every connection."""
    log_every: int = 10
    """Number of steps between two lines of training metrics in metrics.jsonl, at least 1."""
    validate_every: int = 50
    """Number of steps between two validations; 0: only at the end."""
    validation_batches: int = 8
    """Number of held-out batches that one validation uses, at least 1."""
    checkpoint_every: int = 100
    """Number of steps between two checkpoints; 0: only at the end."""
    diagnostics_every: int = 50
    """Number of steps between two diagnostics of gains and streams; 0: none.  They run in a program apart from the train step."""
    init_from: str = ""
    """Folder of a run or of a converted model from which the run starts (`runs.warm_start`); empty: random parameters."""
    init_state: str = "parameters"
    """What the run takes from `init_from`, one of `INIT_STATES`.

    - `parameters`: the parameters.  The run begins at step 0 with a new state of the optimizer.
    - `all`: also the state of the optimizer, the number of steps and the position in the text.  The run goes on at that step with
      settings of its own, as for more steps or for the decay of a `wsd` schedule."""
    trackers: tuple[str, ...] = ()
    """Services that get the metrics besides metrics.jsonl: `tensorboard`, `wandb`, both, or none if empty.

    Settings of wandb follow its name, as in `wandb:project=demo:group=a:tags=b+c:name=d:mode=offline` (`compound.Wandb`)."""

    def __post_init__(self) -> None:
        at_least(1, self, "train.", "steps", "log_every", "validation_batches")
        at_least(0, self, "train.", "validate_every", "checkpoint_every", "diagnostics_every")
        check_seed("train.seed", self.seed)
        one_of("train.init_state", self.init_state, INIT_STATES)
        require(
            bool(self.init_from) or self.init_state == "parameters",
            "train.init_state is 'all', and train.init_from names no folder to take the state from; set it.",
        )
        for tracker in self.trackers:
            read_tracker(tracker)
        names = {tracker.partition(":")[0] for tracker in self.trackers}
        require(len(names) == len(self.trackers), f"train.trackers is {self.trackers}; name each tracker once.")


@dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run, one field for each section."""

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
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, more than train.steps {self.train.steps}; "
            f"lower the first or raise the second.",
        )
        check_dimensions(self)

    def with_settings(self, **sections: Mapping[str, Any]) -> ExperimentConfig:
        """Return a copy with some settings changed, as in `config.with_settings(model={"width": 64}, data={"seed": 1})`.

        Raises:
          InputError: the settings do not fit together.
        """
        changed = {name: replace(getattr(self, name), **settings) for name, settings in sections.items()}
        return replace(self, **changed)


def check_dimensions(config: ExperimentConfig) -> None:
    """Raise `InputError` if an axis of `config.mesh` does not divide the dimension that it splits.

    The vocabulary is an exception: if mesh.tensor does not divide model.vocab_size, the vocabulary is not split.
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
        model.attention != "cudnn" or model.attention_scope == "window" or data.sequence_length % 2 == 0,
        f"data.sequence_length is {data.sequence_length}; model.attention 'cudnn' with model.attention_scope "
        f"{model.attention_scope!r} needs an even one, or use 'xla'.",
    )
    require(
        model.attention != "splash" or fits_splash(config),
        f"model.attention is 'splash', which needs data.sequence_length and model.head_width that are multiples of 128 and keys "
        f"that are multiples of 64, not {data.sequence_length}, {model.head_dim} and {model.key_width}; use 'xla'.",
    )


def fits_splash(config: ExperimentConfig) -> bool:
    """Return whether JAX's flash attention for TPUs (splash attention) can run with the sizes of `config`.

    It needs multiples of 128 for the length of sequences and the width of values, and multiples of 64 for the width of keys.
    """
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
