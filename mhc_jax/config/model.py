"""Settings of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhc_jax import connections
from mhc_jax.config.compound import (
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
    """Settings of the decoder.  C stands for the width, and L = 2 num_layers for the number of sub-layers.

    `attention_kind`, `experts` and `remat` are texts.  They are stored in their shortest spelling, so that two spellings of one
    value are one configuration.  Properties such as `kv_rank` and `num_experts` give the parts of these texts.
    """

    vocab_size: int = 0
    """Number of tokens of the vocabulary; 0: as many as the tokenizer has."""
    width: int = 128
    """C, the number of channels of one stream; at least 1."""
    num_layers: int = 8
    """Number of blocks, at least 1.  Each block has two sub-layers, attention and feed-forward."""
    num_heads: int = 4
    """Number of query heads, at least 1."""
    num_kv_heads: int = 2
    """Number of key/value heads (GQA, arXiv 2305.13245), a divisor of num_heads; 1 is multi-query attention."""
    head_width: int = 0
    """Number of channels of one head; 0: width / num_heads.

    With `mla` values have this width, and so do queries and keys without their RoPE columns."""
    attention_kind: str = "gqa"
    """Kind of attention: `gqa` (grouped key/value heads) or `mla` (multi-head latent attention).

    Settings of `mla` (`LatentAttention`) follow it, as in `mla:kv_rank=512:rope_width=64`.  `mla` ignores num_kv_heads."""
    attention: str = "xla"
    """Program that computes attention.  T is the length of a sequence.

    - `xla`: any device and dtype; writes T x T scores to memory.
    - `cudnn`: flash attention of NVIDIA GPUs; 16-bit compute_dtype only.
    - `splash`: JAX's flash attention for TPUs.  T and the head width are multiples of 128, with `mla` rope_width of 64."""
    mlp_width: int = 384
    """Hidden width of SwiGLU in dense blocks, at least 1.  With experts only the leading blocks are dense."""
    experts: str = ""
    """Number of routed experts and their settings (`Experts`); empty: dense blocks only.

    `64` means `64:active=6:shared=2:width=128:dense_layers=1:buffer=0`: 64 experts with the default settings."""
    embedding_init_std: float = 0.02
    """Standard deviation of the embedding at initialisation, above 0 (GPT-2's 0.02)."""
    depth_scaled_init: bool = True
    """Whether output projections start at 1/sqrt(L) of the standard deviation of other projections (GPT-2).

    The sum over depth then has the variance of one branch."""
    tied_embeddings: bool = False
    """Whether the unembedding is the transposed embedding."""
    compute_dtype: str = "float32"
    """Dtype of branches, one of `DTYPES`.  Parameters are float32, and norms, softmax and coefficients compute in float32."""
    stream_dtype: str = "float32"
    """Dtype of the residual stream(s) between sub-layers, one of `DTYPES`."""
    remat: str = "none"
    """What the backward pass computes again, in order to save memory, instead of keeping it from the forward pass.

    - `none`: nothing.
    - `connection`: streams and coefficients, L_r sub-layers at a time, and no branch (mHC section 4.3.2).  `connection:6` sets
      L_r = 6; without a number L_r is the one that takes the least memory (Eq. 20).
    - `full`: whole blocks.
    - `auto`: the first of `none`, `connection` and `full` whose estimated memory fits a device.  `auto:80` says that a device has
      80 GB (1e9 bytes).  Without a number no limit is known, and `auto` means `connection`."""
    unroll: int = 1
    """Number of blocks per step of the scan over depth.  With num_layers the program has no loop over depth."""
    connection: ConnectionConfig = field(default_factory=lambda: connections.default_config("mhc"))
    """Connection around each sub-layer F, which replaces x + F(x), and its settings (`mhc_jax/connections/`)."""

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
        """Raise `InputError` unless vocab_size is set.  A plan needs it, because it has no tokenizer to take the size from."""
        require(self.vocab_size > 0, "model.vocab_size is 0, the tokenizer's; set --config.model.vocab_size=...")

    @property
    def num_leading(self) -> int:
        """Number of dense blocks in front of the blocks with experts; 0 if all blocks are alike."""
        return self.num_dense_layers if self.num_experts else 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.num_heads

    @property
    def key_width(self) -> int:
        """Number of channels of a query or a key of one head, including MLA's columns that carry the position."""
        return self.head_dim + (self.rope_width if self.uses_mla else 0)

    @property
    def num_sublayers(self) -> int:
        """Number of sub-layers, the L of the papers.  Attention and feed-forward of a block count as two."""
        return 2 * self.num_layers

    @property
    def uses_mla(self) -> bool:
        """Whether attention is multi-head latent attention (MLA)."""
        return self._latent is not None

    @property
    def kv_rank(self) -> int:
        """Width of the latent that MLA makes keys and values from."""
        return (self._latent or LatentAttention()).kv_rank

    @property
    def rope_width(self) -> int:
        """Number of columns of MLA's queries and keys that carry the position."""
        return (self._latent or LatentAttention()).rope_width

    @property
    def num_experts(self) -> int:
        """Number of routed experts of a feed-forward sub-layer; 0 if all blocks are dense."""
        return self._experts.number

    @property
    def num_active_experts(self) -> int:
        """Number of routed experts that a token is sent to."""
        return self._experts.active

    @property
    def num_shared_experts(self) -> int:
        """Number of experts that every token is sent to."""
        return self._experts.shared

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self._experts.width

    @property
    def num_dense_layers(self) -> int:
        """Number of leading blocks without experts.  It has no effect if the model has no experts."""
        return self._experts.dense_layers

    @property
    def expert_buffer(self) -> float:
        """Capacity of the buffer of each device that owns experts, in multiples of the even load.

        0: room for all copies of tokens that can come, so that none is dropped.
        """
        return self._experts.buffer

    @property
    def remat_policy(self) -> str:
        """What the backward pass computes again: `none`, `connection`, `full` or `auto`, without the number that may follow."""
        return self._remat.policy

    @property
    def remat_block(self) -> int:
        """L_r, the number of sub-layers that `connection` computes again at a time; 0: the L_r that takes the least memory."""
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
