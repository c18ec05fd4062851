"""Convert models between Hugging Face's Llama family and decoders without streams.

| Hugging Face | shape | our parameter | shape |
| --- | --- | --- | --- |
| `model.embed_tokens.weight` | [V, C] | `embedding` | [V, C] |
| `model.layers.{i}.input_layernorm.weight` | [C] | `layers/attention/norm/weight` | [N, C] |
| `model.layers.{i}.self_attn.{q,k,v}_proj.weight` | [out, in] | `layers/attention/W_{q,k,v}` | [N, in, out] |
| `model.layers.{i}.self_attn.{q,k}_norm.weight` (Qwen3) | [D] | `layers/attention/{q,k}_norm/weight` | [N, D] |
| `model.layers.{i}.self_attn.o_proj.weight` | [C, HD] | `layers/attention/W_o` | [N, HD, C] |
| `model.layers.{i}.post_attention_layernorm.weight` | [C] | `layers/mlp/norm/weight` | [N, C] |
| `model.layers.{i}.mlp.{gate,up,down}_proj.weight` | [out, in] | `layers/mlp/W_{gate,up,down}` | [N, in, out] |
| `model.norm.weight` | [C] | `final_norm/weight` | [C] |
| `lm_head.weight` (absent if tied) | [V, C] | `unembedding` | [C, V] |

Llama, Mistral, SmolLM2 and Qwen3 share these names.  Both sides rotate the channels (d, d + D/2) in RoPE, so that values are only
moved and cast.  Our parameters are float32, which holds every bfloat16 and float16 exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mhc_jax.config import ModelConfig
from mhc_jax.connections import parse
from mhc_jax.errors import InputError, require
from mhc_jax.weights.tensor_files import TensorFiles, flattened, nested

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architectures that are read, by their `model_type`."""
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""Dtypes in which weights are written."""
IGNORED = "rotary_emb.inv_freq"
"""End of the names of arrays in old files that are computed from rope_theta."""


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of the decoder that computes what a Hugging Face model computes.

    Args:
      settings: content of the model's config.json.

    Raises:
      InputError: the architecture is another one, or has a part that the decoder lacks.
    """
    kind = settings.get("model_type")
    require(
        isinstance(kind, str) and kind in ARCHITECTURES,
        f"config.json is that of the architecture {kind!r}; those that are converted are {', '.join(ARCHITECTURES)}.",
    )
    ropes = [settings.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    require(
        all(isinstance(rope, Mapping) for rope in ropes),
        "config.json has rope_parameters or rope_scaling that are no objects.",
    )
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
    scaling = next((found for found in kinds if found != "default"), "default")
    heads, width = _number(settings, "num_attention_heads"), _number(settings, "hidden_size")
    unsupported = {
        "rope_scaling": scaling != "default",
        "partial_rotary_factor": ropes[0].get("partial_rotary_factor", settings.get("partial_rotary_factor", 1)) != 1,
        "attention_bias": settings.get("attention_bias"),
        "mlp_bias": settings.get("mlp_bias"),
        "hidden_act": settings.get("hidden_act", "silu") != "silu",
    }
    for name, found in unsupported.items():
        value = scaling if name == "rope_scaling" else settings.get(name)
        require(not found, f"config.json sets {name} to {value!r}, which this decoder does not have.")
    return ModelConfig(
        vocab_size=_number(settings, "vocab_size"),
        width=width,
        num_layers=_number(settings, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_number(settings, "num_key_value_heads", heads if kind == "llama" else None),
        head_width=_number(settings, "head_dim", None if kind == "qwen3" else width // heads),
        mlp_width=_number(settings, "intermediate_size"),
        qk_norm=kind == "qwen3",
        rope_theta=_real("rope_theta", ropes[0].get("rope_theta") or settings.get("rope_theta") or 1e4),
        norm_eps=_real("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(settings.get("tie_word_embeddings", False)),
        connection=parse("residual"),
    )


def context_length(settings: Mapping[str, Any]) -> int:
    """Return the number of tokens up to which the decoder computes what a Hugging Face model computes.

    It is `max_position_embeddings`, or the sliding window if that is shorter, since our attention reads all earlier tokens.
    """
    longest = _number(settings, "max_position_embeddings")
    # Hugging Face's Mistral has this window if its config.json does not say another or null.
    window = settings.get("sliding_window", 4096 if settings["model_type"] == "mistral" else None)
    window = window if settings.get("use_sliding_window", True) else None
    return min(longest, window or longest)


def from_hugging_face(tensors: TensorFiles, config: ModelConfig) -> dict[str, Any]:
    """Return the decoder's parameters, float32 NumPy arrays, from the weights of a Hugging Face model.

    Args:
      tensors: the model's safetensors files.
      config: settings of the decoder, from `model_config`.

    Raises:
      InputError: an array is missing or has a wrong shape or dtype, or the files hold an array that has no place in the decoder.
    """
    single, of_layers = _table(config)
    flat, used = {}, set()

    def take(name: str, shape: tuple[int, ...], turned: bool) -> np.ndarray:
        used.add(name)
        array = tensors.take(name, shape[::-1] if turned else shape).astype(np.float32)
        return array.T if turned else array

    for ours, (theirs, shape, turned) in single.items():
        flat[ours] = take(theirs, shape, turned)
    for ours, (theirs, shape, turned) in of_layers.items():
        stack = np.empty((config.num_layers, *shape), np.float32)
        for i in range(config.num_layers):
            stack[i] = take(f"model.layers.{i}.{theirs}", shape, turned)
        flat[f"layers/{ours}"] = stack
    if config.tied_embeddings and "lm_head.weight" in tensors.shapes:
        require(
            np.array_equal(take("lm_head.weight", flat["embedding"].shape, False), flat["embedding"]),
            "config.json says that embeddings are tied (tie_word_embeddings), and lm_head.weight differs from the embedding; "
            "set tie_word_embeddings to false, or remove lm_head.weight.",
        )
    more = sorted(name for name in {*tensors.shapes} - used if not name.endswith(IGNORED))
    require(
        not more,
        f"{tensors.folder} holds {len(more)} arrays that have no place in the decoder, such as {(more or [''])[0]}; the model is "
        "not the one that its config.json describes.",
    )
    return nested(flat)


def to_hugging_face(params: Mapping[str, Any], config: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return the weights of a decoder without streams under Hugging Face's names, in the dtype named by `dtype`.

    Raises:
      InputError: the decoder has streams, experts or latent attention, or `dtype` is not one of `DTYPES`.
    """
    require_plain(config)
    require(dtype in DTYPES, f"The dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    single, of_layers = _table(config)
    flat, weights = flattened(params), {}

    def put(name: str, array: Any, turned: bool) -> None:
        array = np.asarray(array)
        weights[name] = np.ascontiguousarray(array.T if turned else array).astype(DTYPES[dtype])

    for ours, (theirs, _, turned) in single.items():
        put(theirs, flat[ours], turned)
    for ours, (theirs, _, turned) in of_layers.items():
        for i, array in enumerate(flat[f"layers/{ours}"]):
            put(f"model.layers.{i}.{theirs}", array, turned)
    return weights


def hugging_face_config(
    config: ModelConfig, context: int, end: int | None, start: int | None, dtype: str
) -> dict[str, Any]:
    """Return the config.json with which Hugging Face's library loads the weights of `to_hugging_face`.

    The architecture is Qwen3 with norms of queries and keys, and Llama without.

    Args:
      config: settings of the decoder.
      context: number of tokens of a training sequence.
      end, start: ids of the end-of-document token and of the beginning-of-sequence token; None: there is none.
      dtype: dtype of the weights.
    """
    require_plain(config)
    kind = "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": context,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "bos_token_id": start,
        "eos_token_id": end,
        "torch_dtype": dtype,
    }


def require_plain(config: ModelConfig) -> None:
    """Raise `InputError` unless the decoder is one of the Llama family: one stream, grouped attention, dense blocks."""
    kind = config.connection.kind
    if kind != "residual":
        raise InputError(
            f"The model has the connection {kind!r}, and the Llama family has residual connections alone; write it in our own "
            "form, --to=model."
        )
    require(
        not config.uses_mla and not config.num_experts,
        "The model has latent attention or experts, which the Llama family does not have; write it in our own form, --to=model.",
    )


Table = dict[str, tuple[str, tuple[int, ...], bool]]


def _table(config: ModelConfig) -> tuple[Table, Table]:
    """Return the arrays of the whole model, and those of each block.

    Both map our path to (Hugging Face's name, our shape, whether theirs is transposed).
    """
    C, D, F, V = config.width, config.head_dim, config.mlp_width, config.vocab_size
    H, K = config.num_heads * D, config.num_kv_heads * D
    single: Table = {
        "embedding": ("model.embed_tokens.weight", (V, C), False),
        "final_norm/weight": ("model.norm.weight", (C,), False),
    }
    if not config.tied_embeddings:
        single["unembedding"] = ("lm_head.weight", (C, V), True)
    of_layers: Table = {
        "attention/norm/weight": ("input_layernorm.weight", (C,), False),
        "attention/W_q": ("self_attn.q_proj.weight", (C, H), True),
        "attention/W_k": ("self_attn.k_proj.weight", (C, K), True),
        "attention/W_v": ("self_attn.v_proj.weight", (C, K), True),
        "attention/W_o": ("self_attn.o_proj.weight", (H, C), True),
        "mlp/norm/weight": ("post_attention_layernorm.weight", (C,), False),
        "mlp/W_gate": ("mlp.gate_proj.weight", (C, F), True),
        "mlp/W_up": ("mlp.up_proj.weight", (C, F), True),
        "mlp/W_down": ("mlp.down_proj.weight", (F, C), True),
    }
    if config.qk_norm:
        of_layers["attention/q_norm/weight"] = ("self_attn.q_norm.weight", (D,), False)
        of_layers["attention/k_norm/weight"] = ("self_attn.k_norm.weight", (D,), False)
    return single, of_layers


def _number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = settings.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json has {name} = {value!r}; it must be a positive integer.")
    return value


def _real(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"config.json has {name} = {value!r}; it must be a number.")
    return float(value)
