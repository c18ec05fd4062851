"""Settings of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhc_jax import connections
from mhc_jax.config.parts import (
    Experts,
    LatentAttention,
    Remat,
    read_attention,
    read_experts,
    read_remat,
    write_attention,
    write_experts,
    write_remat,
)
from mhc_jax.connections.base import ConnectionConfig
from mhc_jax.errors import at_least, one_of, require

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cudnn", "splash")


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the decoder.  Its letters are C for the width and L = 2 num_layers for the number of sub-layers.

    `attention_kind`, `experts` and `remat` are texts.  They are stored in their shortest spelling, so that two spellings of one
    value are one configuration; the properties below give their parts.
    """

    vocab_size: int = 0
    """Tokens of the vocabulary; 0: as many as the tokenizer has."""
    width: int = 128
    """C, the channels of one stream; at least 1."""
    num_layers: int = 8
    """Blocks, at least 1; each has two sub-layers, attention and feed-forward."""
    num_heads: int = 4
    """Heads of the queries, at least 1."""
    num_kv_heads: int = 2
    """Heads of keys and values (GQA, arXiv 2305.13245), a divisor of num_heads; 1 is multi-query attention."""
    head_width: int = 0
    """Channels of one head; 0: width / num_heads.  With `mla` those of its values, and of its queries and keys without RoPE."""
    attention_kind: str = "gqa"
    """`gqa` (grouped key/value heads), or `mla` (multi-head latent attention; `LatentAttention`), which ignores num_kv_heads.

    Settings of `mla` follow it, as in `mla:kv_rank=512:rope_width=64`."""
    attention: str = "xla"
    """`xla` (any device and dtype; writes T x T scores), `cudnn` (flash attention of NVIDIA GPUs; 16-bit compute_dtype only) or
    `splash` (JAX's flash attention for TPUs; sequence length and head width multiples of 128, with `mla` rope_width of 64)."""
    mlp_width: int = 384
    """Hidden width of SwiGLU, at least 1; with experts, that of the leading dense blocks."""
    experts: str = ""
    """Empty for dense blocks only, or the number of routed experts and their settings (`Experts`).

    `64:active=6:shared=2:width=128:dense_layers=1:buffer=0` spells the defaults of 64 experts, which `64` means alone."""
    embedding_init_std: float = 0.02
    """Standard deviation of the embedding at initialisation, above 0 (GPT-2's 0.02)."""
    depth_scaled_init: bool = True
    """Start output projections at 1/sqrt(L) of the others, so that the sum over depth has the variance of one branch (GPT-2)."""
    tied_embeddings: bool = False
    """The unembedding is the transposed embedding."""
    compute_dtype: str = "float32"
    """Dtype of branches, one of `DTYPES`; parameters are float32, and norms, softmax and coefficients compute in float32."""
    stream_dtype: str = "float32"
    """Dtype of the residual stream(s) between sub-layers, one of `DTYPES`."""
    remat: str = "none"
    """What the backward pass computes again instead of keeping it, and so which memory it saves.

    - `none`: nothing.
    - `connection`: streams and coefficients, L_r sub-layers at a time, and no branch (mHC section 4.3.2).  `connection:6` sets
      L_r = 6; alone it takes the L_r with the least memory (Eq. 20).
    - `full`: whole blocks.
    - `auto`: the first of these three whose estimate fits a device.  `auto:80` gives a device 80 GB (1e9 bytes); alone, no limit
      is known, and it is `connection`."""
    unroll: int = 1
    """Blocks per step of the scan over depth; num_layers gives a graph without a loop."""
    connection: ConnectionConfig = field(default_factory=lambda: connections.default_config("mhc"))
    """What replaces x + F(x); see `mhc_jax/connections/`."""

    def __post_init__(self) -> None:
        at_least(1, self, "model.", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "unroll")
        at_least(0, self, "model.", "vocab_size", "head_width")
        require(
            self.head_width > 0 or self.width % self.num_heads == 0,
            f"model.num_heads is {self.num_heads}, which does not divide model.width {self.width}; "
            f"choose heads among the divisors of the width, or set model.head_width.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_heads {self.num_heads}.",
        )
        require(
            self.embedding_init_std > 0, f"model.embedding_init_std is {self.embedding_init_std}; it must be above 0."
        )
        one_of("model.compute_dtype", self.compute_dtype, DTYPES)
        one_of("model.stream_dtype", self.stream_dtype, DTYPES)
        one_of("model.attention", self.attention, ATTENTION)
        require(
            self.attention != "cudnn" or self.compute_dtype != "float32",
            "model.attention is 'cudnn', which computes in bfloat16 or float16, and model.compute_dtype is 'float32'; "
            "change one of them.",
        )
        self._check_parts()
        shortest = {
            "attention_kind": write_attention(self._latent),
            "experts": write_experts(self._experts),
            "remat": write_remat(self._remat),
        }
        for name, text in shortest.items():
            object.__setattr__(self, name, text)

    def _check_parts(self) -> None:
        require(
            self.head_dim % 2 == 0 or self.uses_mla,
            f"The width of a head (model.head_width, or model.width / model.num_heads) is {self.head_dim}; rotary "
            f"embeddings need an even one.",
        )
        require(
            self.attention != "cudnn" or not self.uses_mla,
            "model.attention is 'cudnn', which needs values as wide as keys; model.attention_kind 'mla' runs with 'xla' or "
            "'splash'.",
        )
        require(
            self.num_experts == 0 or self.num_dense_layers < self.num_layers,
            f"model.experts is {self.experts!r}; dense_layers must lie between 0 and model.num_layers - 1, {self.num_layers - 1}: "
            "leave model.experts empty for dense blocks only.",
        )
        require(
            self.remat_block <= self.num_sublayers,
            f"model.remat is {self.remat!r}; the number of sub-layers must lie between 1 and {self.num_sublayers}.",
        )

    def require_vocabulary(self) -> None:
        """Raise `InputError` unless vocab_size is set: a plan has no tokenizer that could say it."""
        require(self.vocab_size > 0, "model.vocab_size is 0, the tokenizer's; set --config.model.vocab_size=...")

    @property
    def num_leading(self) -> int:
        """Dense blocks in front of those with experts; 0 where all blocks are alike."""
        return self.num_dense_layers if self.num_experts else 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.num_heads

    @property
    def key_width(self) -> int:
        """Channels of a query or a key of one head, those that carry the position included."""
        return self.head_dim + (self.rope_width if self.uses_mla else 0)

    @property
    def num_sublayers(self) -> int:
        """L of the papers: attention and feed-forward count as two."""
        return 2 * self.num_layers

    @property
    def uses_mla(self) -> bool:
        """Attention is multi-head latent attention."""
        return self._latent is not None

    @property
    def kv_rank(self) -> int:
        """Width of MLA's latent."""
        return (self._latent or LatentAttention()).kv_rank

    @property
    def rope_width(self) -> int:
        """Columns of MLA's queries and keys that carry the position."""
        return (self._latent or LatentAttention()).rope_width

    @property
    def num_experts(self) -> int:
        """Routed experts of a feed-forward sub-layer; 0 where all blocks are dense."""
        return self._experts.number

    @property
    def num_active_experts(self) -> int:
        """Routed experts that a token sees."""
        return self._experts.active

    @property
    def num_shared_experts(self) -> int:
        """Experts that every token sees."""
        return self._experts.shared

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self._experts.width

    @property
    def num_dense_layers(self) -> int:
        """Leading blocks without experts, where there are experts."""
        return self._experts.dense_layers

    @property
    def expert_buffer(self) -> float:
        """Room of an owner of experts, in multiples of the even share; 0: for all copies that can come."""
        return self._experts.buffer

    @property
    def remat_policy(self) -> str:
        """`none`, `connection`, `full` or `auto`."""
        return self._remat.policy

    @property
    def remat_block(self) -> int:
        """L_r, the sub-layers that `connection` computes again at a time; 0: the number with the least memory."""
        return self._remat.block

    @property
    def remat_budget_gb(self) -> float:
        """Memory of a device in GB (1e9 bytes) that `auto` plans for; 0: unknown."""
        return self._remat.budget_gb

    @property
    def _latent(self) -> LatentAttention | None:
        return read_attention(self.attention_kind)

    @property
    def _experts(self) -> Experts:
        return read_experts(self.experts)

    @property
    def _remat(self) -> Remat:
        return read_remat(self.remat)
