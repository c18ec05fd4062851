"""Settings of a run: frozen dataclasses, checked when they are built.

`mapping.py` turns them into plain nested mappings and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mhc_jax import connections
from mhc_jax.connections.base import ConnectionConfig
from mhc_jax.errors import one_of, require
from mhc_jax.layers import attention
from mhc_jax.pipeline.schedules import SCHEDULES as PIPELINES
from mhc_jax.sharding import MeshConfig, check_dimensions

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_KINDS = ("gqa", "mla")
REMAT = ("none", "connection", "full", "auto")
SCHEDULES = ("constant", "cosine", "step", "wsd")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder.  Letters as in the README: C width, L = 2 num_layers sub-layers, n streams."""

    vocab_size: int = 0
    """0: the tokenizer's."""
    width: int = 128
    num_layers: int = 8
    """Blocks; each has two sub-layers, attention and feed-forward."""
    num_heads: int = 4
    num_kv_heads: int = 2
    """Key/value heads (GQA); equal to num_heads for multi-head attention, 1 for multi-query."""
    head_width: int = 0
    """Of one attention head; 0: width / num_heads.  With `mla`: of its values, and of its queries and keys without RoPE."""
    attention_kind: str = "gqa"
    """`gqa` (grouped key/value heads), or `mla` (DeepSeek's multi-head latent attention), which ignores num_kv_heads."""
    kv_rank: int = 512
    """`mla` only: width of the latent that keys and values are made from."""
    rope_width: int = 64
    """`mla` only: columns of each query, and of the key that all heads share, that carry the position."""
    attention: str = "xla"
    """`xla` (any device and dtype; writes T x T scores), `cudnn` (flash attention of NVIDIA GPUs; 16-bit compute_dtype only) or
    `splash` (JAX's flash attention for TPUs; sequence length and head width multiples of 128, with `mla` rope_width of 64)."""
    mlp_width: int = 384
    """Hidden width of SwiGLU; with experts, that of the leading dense blocks."""
    num_experts: int = 0
    """Routed experts of a feed-forward sub-layer (DeepSeekMoE); 0: dense blocks only."""
    num_active_experts: int = 6
    """Routed experts that a token sees."""
    num_shared_experts: int = 2
    """Experts that every token sees."""
    expert_width: int = 128
    """Hidden width of one expert."""
    num_dense_layers: int = 1
    """Leading blocks without experts, where num_experts is not 0."""
    routed_scale: float = 1.0
    """What the gates of a token's routed experts sum to."""
    balancing_rate: float = 1e-3
    """gamma: what a router's bias moves a step towards even loads, without a loss term (DeepSeek-V3's 0.001); 0: not at all."""
    expert_buffer: float = 0.0
    """Under a mesh with an axis of experts: copies of tokens that a device has room for, in multiples of what it gets when loads
    are even; more are dropped (metric router_dropped).  0: room for all that can come, and nothing is ever dropped."""
    rope_theta: float = 1e4
    norm_eps: float = 1e-20
    """Of every RMSNorm, as in mHC Table 5; larger values break step-0 equality at small embeddings."""
    embedding_init_std: float = 0.02
    depth_scaled_init: bool = True
    """Start output projections at 1/sqrt(L) of the others, so that the sum over depth has the variance of one branch (GPT-2)."""
    tied_embeddings: bool = False
    compute_dtype: str = "float32"
    """Of branches; parameters are float32, norms, softmax and coefficients compute in float32."""
    stream_dtype: str = "float32"
    """Of the residual stream(s) between sub-layers."""
    remat: str = "none"
    """What the backward pass computes again: `none`, `connection` (streams and coefficients from every L_r-th sub-layer, no
    branch; mHC section 4.3.2), `full` (whole blocks), or `auto`: the first of these whose estimate fits remat_budget_gb."""
    remat_block: int = 0
    """`connection` and `auto` only: L_r, the sub-layers computed again at a time; 0: the one with the least memory (Eq. 20)."""
    remat_budget_gb: float = 0.0
    """`auto` only: memory of a device in GB (1e9 bytes); 0: no limit is known, and `auto` is `connection`."""
    unroll: int = 1
    """Blocks per step of the scan over depth; num_layers gives a graph without a loop."""
    connection: ConnectionConfig = field(default_factory=lambda: connections.default_config("mhc"))

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "unroll"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} is {value}; it must be at least 1.")
        require(self.head_width >= 0, f"model.head_width is {self.head_width}; use 0 for width / num_heads.")
        require(
            self.head_width > 0 or self.width % self.num_heads == 0,
            f"model.num_heads is {self.num_heads}, which does not divide model.width {self.width}; "
            f"choose heads among the divisors of the width, or set model.head_width.",
        )
        require(
            self.head_dim % 2 == 0 or self.attention_kind == "mla",
            f"The width of a head (model.head_width, or model.width / model.num_heads) is {self.head_dim}; rotary "
            f"embeddings need an even one.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_heads {self.num_heads}.",
        )
        require(self.vocab_size >= 0, f"model.vocab_size is {self.vocab_size}; use 0 for the tokenizer's size.")
        require(
            self.embedding_init_std > 0, f"model.embedding_init_std is {self.embedding_init_std}; it must be above 0."
        )
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be above 0.")
        require(self.norm_eps >= 0, f"model.norm_eps is {self.norm_eps}; it must not be negative.")
        one_of("model.compute_dtype", self.compute_dtype, DTYPES)
        one_of("model.stream_dtype", self.stream_dtype, DTYPES)
        one_of("model.attention", self.attention, attention.IMPLEMENTATIONS)
        require(
            self.attention != "cudnn" or self.compute_dtype != "float32",
            "model.attention is 'cudnn', which computes in bfloat16 or float16, and model.compute_dtype is 'float32'; "
            "change one of them.",
        )
        one_of("model.remat", self.remat, REMAT)
        require(
            0 <= self.remat_block <= self.num_sublayers,
            f"model.remat_block is {self.remat_block}; it must lie between 1 and the {self.num_sublayers} sub-layers, or be 0 "
            "for the one with the least memory.",
        )
        require(
            0 <= self.remat_budget_gb < float("inf"),
            f"model.remat_budget_gb is {self.remat_budget_gb}; it must not be negative.",
        )
        require(
            self.remat_block == 0 or self.remat in ("connection", "auto"),
            f"model.remat_block is {self.remat_block}, and model.remat {self.remat!r} has no use for it; set model.remat to "
            "'connection' or 'auto'.",
        )
        require(
            self.remat_budget_gb == 0 or self.remat == "auto",
            f"model.remat_budget_gb is {self.remat_budget_gb}, and model.remat {self.remat!r} has no use for it; set "
            "model.remat to 'auto'.",
        )
        one_of("model.attention_kind", self.attention_kind, ATTENTION_KINDS)
        if self.attention_kind == "mla":
            self._check_mla()
        require(self.num_experts >= 0, f"model.num_experts is {self.num_experts}; use 0 for dense blocks only.")
        if self.num_experts:
            self._check_experts()

    def _check_mla(self) -> None:
        require(self.kv_rank >= 1, f"model.kv_rank is {self.kv_rank}; it must be at least 1.")
        require(
            self.rope_width >= 2 and self.rope_width % 2 == 0,
            f"model.rope_width is {self.rope_width}; rotary embeddings need an even width of at least 2.",
        )
        require(
            self.attention != "cudnn",
            "model.attention is 'cudnn', which needs values as wide as keys; model.attention_kind 'mla' runs with 'xla' or "
            "'splash'.",
        )

    def _check_experts(self) -> None:
        require(self.expert_width >= 1, f"model.expert_width is {self.expert_width}; it must be at least 1.")
        require(
            1 <= self.num_active_experts <= self.num_experts,
            f"model.num_active_experts is {self.num_active_experts}; it must lie between 1 and model.num_experts, "
            f"{self.num_experts}.",
        )
        require(
            self.num_shared_experts >= 0,
            f"model.num_shared_experts is {self.num_shared_experts}; it must not be negative.",
        )
        require(
            0 <= self.num_dense_layers < self.num_layers,
            f"model.num_dense_layers is {self.num_dense_layers}; it must lie between 0 and model.num_layers - 1, "
            f"{self.num_layers - 1}: use model.num_experts=0 for dense blocks only.",
        )
        require(0 < self.routed_scale < float("inf"), f"model.routed_scale is {self.routed_scale}; it must be above 0.")
        require(
            0 <= self.balancing_rate < float("inf"),
            f"model.balancing_rate is {self.balancing_rate}; it must not be negative.",
        )
        require(
            self.expert_buffer == 0 or 1 <= self.expert_buffer < float("inf"),
            f"model.expert_buffer is {self.expert_buffer}; use 0 for room for all that can come, or a multiple of the even share "
            f"that is at least 1.",
        )

    @property
    def num_leading(self) -> int:
        """Dense blocks in front of those with experts; 0 where all blocks are alike."""
        return self.num_dense_layers if self.num_experts else 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.num_heads

    @property
    def num_sublayers(self) -> int:
        """L of the papers: attention and feed-forward count as two."""
        return 2 * self.num_layers


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
class PipelineConfig:
    """How the stages of mesh.stage work together; without them nothing."""

    schedule: str = "1f1b"
    """`gpipe`, `1f1b`, `interleaved`, `zb1p`, `dualpipe` or `dualpipev` (`mhc_jax/pipeline/schedules.py`)."""
    chunks: int = 0
    """`interleaved` only: stages a device holds; 0: the schedule's own number."""
    overlap: bool = False
    """Boundary tensors travel while the next tick computes, instead of between two ticks; a schedule then takes more ticks."""

    def __post_init__(self) -> None:
        one_of("pipeline.schedule", self.schedule, PIPELINES)
        require(self.chunks >= 0, f"pipeline.chunks is {self.chunks}; use 0 for the schedule's own number.")


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
