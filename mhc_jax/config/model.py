"""Settings of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhc_jax import connections
from mhc_jax.connections.base import ConnectionConfig
from mhc_jax.errors import one_of, require

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_KINDS = ("gqa", "mla")
ATTENTION = ("xla", "cudnn", "splash")
REMAT = ("none", "connection", "full", "auto")


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
        one_of("model.attention", self.attention, ATTENTION)
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
