"""Settings of the decoder (section `model` of a configuration)."""

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
from mhc_jax.errors import at_least, finite, one_of, require
from mhc_jax.settings_text import read_number

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cudnn", "splash")
UNRESOLVED = (
    "model.attention_scope is 'document', and the id of the end-of-document token is the tokenizer's; set "
    "--config.model.attention_scope=document:ID."
)


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the decoder.  C stands for the width, and L = 2 num_layers for the number of sub-layers.

    `attention_kind`, `experts` and `remat` are texts that hold several settings each.  Each is stored in its shortest spelling, so
    that configurations with the same meaning are equal.  Properties such as `kv_rank` and `num_experts` give the single settings.
    """

    vocab_size: int = 0
    """Number of tokens in the vocabulary; 0: the number that the tokenizer has."""
    width: int = 128
    """C, the number of channels of one stream; at least 1."""
    num_layers: int = 8
    """Number of blocks, at least 1.  Each block has two sub-layers, attention and feed-forward."""
    num_heads: int = 4
    """Number of query heads, at least 1."""
    num_kv_heads: int = 2
    """Number of key/value heads (GQA, arXiv 2305.13245), a divisor of num_heads; 1 is multi-query attention."""
    head_width: int = 0
    """Number of channels of one attention head; 0: width / num_heads.

    With `mla` this is the width of values, and of queries and keys without their RoPE columns."""
    qk_norm: bool = False
    """Whether queries and keys of each head go through RMSNorm before RoPE (Qwen3, arXiv 2505.09388).  `mla` does not have it."""
    rope_theta: float = 1e4
    """Base of the frequencies of RoPE (arXiv 2104.09864, section 3.2.2), above 0."""
    norm_eps: float = 1e-20
    """Epsilon of all RMSNorms of the decoder, not negative.  The default is that of mHC Table 5.

    Under many connections the decoder equals Pre-Norm, the decoder with x + F(x), at step 0, because norms remove constant factors
    of their inputs.  With small embeddings a norm with a larger epsilon keeps such a factor, and the decoders differ."""
    attention_kind: str = "gqa"
    """Kind of attention: `gqa` (grouped key/value heads) or `mla` (multi-head latent attention).

    Settings of `mla` (`LatentAttention`) follow it, as in `mla:kv_rank=512:rope_width=64`.  `mla` ignores num_kv_heads."""
    attention: str = "xla"
    """Implementation of attention.  T is the length of a sequence.

    - `xla`: runs on any device and with any dtype, and writes the T x T scores to memory.
    - `cudnn`: flash attention for NVIDIA GPUs.  compute_dtype must be a 16-bit dtype.
    - `splash`: JAX's flash attention for TPUs.  T and the head width must be multiples of 128.  With `mla`,
      rope_width must be a multiple of 64."""
    attention_scope: str = "window"
    """The earlier tokens to which a token attends.

    - `window`: all of its window, also those of other documents.
    - `document`: those of its own document.  The end-of-document token is the first token of the document that follows it.
      `document:256` gives the id of this token, which a run otherwise takes from its tokenizer."""
    mlp_width: int = 384
    """Hidden width of the SwiGLU branch of dense blocks, at least 1.  With experts only the leading blocks are dense."""
    experts: str = ""
    """Number of routed experts and their settings (`Experts`); empty: dense blocks only.

    `64` means `64:active=6:shared=2:width=128:dense_layers=1:buffer=0`: 64 experts with the default settings."""
    embedding_init_std: float = 0.02
    """Standard deviation of the embedding at initialisation, above 0.  The default is GPT-2's."""
    depth_scaled_init: bool = True
    """Whether the output projections of branches start with 1/sqrt(L) of the standard deviation of other projections (GPT-2).

    The sum of all L branch outputs then has the variance that one branch output has without this factor."""
    tied_embeddings: bool = False
    """Whether the unembedding, the matrix that makes logits, is the transposed embedding."""
    compute_dtype: str = "float32"
    """Dtype in which branches compute, one of `DTYPES`.  Parameters, norms, softmax and coefficients are float32 in any case."""
    stream_dtype: str = "float32"
    """Dtype in which the streams are stored between sub-layers, one of `DTYPES`."""
    remat: str = "none"
    """What the backward pass computes again, in order to save memory, instead of keeping it from the forward pass.

    - `none`: nothing.
    - `connection`: streams and coefficients of L_r sub-layers at a time, but no branch (mHC section 4.3.2).  `connection:6` sets
      L_r = 6.  Without a number, L_r takes the value that needs the least memory (Eq. 20).
    - `full`: whole blocks.
    - `auto`: the first of `none`, `connection` and `full` whose estimated memory fits a device.  `auto:80` says that a device has
      80 GB (of 1e9 bytes).  `auto` without a number means `connection`, because the limit is not known."""
    unroll: int = 1
    """Number of blocks in one step of the loop over depth (`jax.lax.scan`).  If it is num_layers, the program has no such loop."""
    connection: ConnectionConfig = field(default_factory=lambda: connections.default_config("mhc"))
    """The kind of connection that replaces x + F(x) around each branch F, with its settings (`mhc_jax/connections/`)."""

    def __post_init__(self) -> None:
        finite(self, "model.")
        at_least(1, self, "model.", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "unroll")
        at_least(0, self, "model.", "vocab_size", "head_width", "norm_eps")
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be above 0.")
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
        _, token = self._scope
        require(
            token is None or 0 <= token < (self.vocab_size or token + 1),
            f"model.attention_scope is {self.attention_scope!r}; the id of the end-of-document token must lie between 0 and "
            f"model.vocab_size - 1.",
        )
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
            not (self.qk_norm and self.uses_mla),
            "model.qk_norm is True, and model.attention_kind is 'mla', which has no norm of queries and keys; change one of them.",
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

    def require_resolved(self) -> None:
        """Raise `InputError` if a setting is left to the tokenizer, because estimates (`mhc_jax/planning`) load none."""
        require(self.vocab_size > 0, "model.vocab_size is 0, the tokenizer's; set --config.model.vocab_size=...")
        require(self._scope != ("document", None), UNRESOLVED)

    @property
    def document_token(self) -> int | None:
        """Id of the end-of-document token if attention is limited to documents, else None.

        Raises:
          InputError: attention_scope is `document`, without the id that the tokenizer has (`mhc_jax.data.resolve_tokenizer`).
        """
        scope, token = self._scope
        require(scope == "window" or token is not None, UNRESOLVED)
        return token

    @property
    def num_leading(self) -> int:
        """Number of dense blocks before the first block with experts; 0 if the model has no experts."""
        return self.num_dense_layers if self.num_experts else 0

    @property
    def head_dim(self) -> int:
        """Number of channels of one attention head."""
        return self.head_width or self.width // self.num_heads

    @property
    def key_width(self) -> int:
        """Number of channels of a query or key of one head, including the columns with which MLA encodes the position."""
        return self.head_dim + (self.rope_width if self.uses_mla else 0)

    @property
    def num_sublayers(self) -> int:
        """Number L of sub-layers of the decoder.  The attention and the feed-forward of a block count as two."""
        return 2 * self.num_layers

    @property
    def uses_mla(self) -> bool:
        """Whether attention is multi-head latent attention (MLA)."""
        return self._latent is not None

    @property
    def kv_rank(self) -> int:
        """Width of the latent vector from which MLA makes keys and values."""
        return (self._latent or LatentAttention()).kv_rank

    @property
    def rope_width(self) -> int:
        """Number of columns of MLA's queries and keys that encode the position (RoPE)."""
        return (self._latent or LatentAttention()).rope_width

    @property
    def num_experts(self) -> int:
        """Number of routed experts in a feed-forward sub-layer; 0 if all blocks are dense."""
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
        """Number of dense blocks before the first block with experts.  It has no meaning if the model has no experts."""
        return self._experts.dense_layers

    @property
    def expert_buffer(self) -> float:
        """Capacity of the buffer in which a device receives copies of tokens for its experts, in multiples of the even load.

        The even load is the number of copies that each device receives if all receive equally many.  0: the buffer has room for
        all copies that can come, so that none is dropped.
        """
        return self._experts.buffer

    @property
    def remat_policy(self) -> str:
        """Name of the remat policy in `remat`: `none`, `connection`, `full` or `auto`, without the number that may follow it."""
        return self._remat.policy

    @property
    def remat_block(self) -> int:
        """L_r, the number of sub-layers that `connection` of `remat` recomputes at a time; 0: the L_r with the least memory."""
        return self._remat.block

    @property
    def remat_budget_gb(self) -> float:
        """Memory of a device in GB (1e9 bytes) that the remat policy `auto` may use; 0: unknown."""
        return self._remat.budget_gb

    @property
    def _latent(self) -> LatentAttention | None:
        return read_attention(self.attention_kind)

    @property
    def _experts(self) -> Experts:
        return read_experts(self.experts)

    @property
    def _scope(self) -> tuple[str, int | None]:
        return read_number("model.attention_scope", self.attention_scope, ("window", "document"), {"document": int})

    @property
    def _remat(self) -> Remat:
        return read_remat(self.remat)
