"""Folders that hold a model, or the connection of a model, as safetensors and JSON.

A model folder can stand wherever a run folder gives a trained model (`runs.trained.load_trained`):

    config.json         all settings of the run, with model.vocab_size set and the kind of connection under model.connection
    model.safetensors   parameters, float32, under their paths such as `layers/mlp/W_up`; axes of blocks come first
    checksums.json      the SHA-256 of each other file; a folder whose files have changed is refused
    tokenizer.json, tokenizer_config.json   the tokenizer as Hugging Face's library reads it, unless it is `byte`

The header of model.safetensors says the number of updates, and kind, fingerprint and end token of the tokenizer.

A connection folder has the parameters of a connection alone, in the form of `mhc_jax.Wiring`:

    connection.json     `spec`, such as `mhc:num_streams=4`; `width`, the number C of channels; `num_branches`, the number L
    model.safetensors   parameters under `ends/...` and `branches/...`, where the axis of L branches comes first
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.connections import spec
from mhc_jax.connections.convert import from_deepseek_v4
from mhc_jax.data.tokenizers import Tokenizer, hugging_face_files
from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import read_json
from mhc_jax.model import Decoder
from mhc_jax.weights.tensor_files import FILE, TensorFiles, flattened, nested, write_folder
from mhc_jax.wrappers.wiring import Params, Wiring

CONNECTION_FILE = "connection.json"
V4_SPEC = "mhc:eps_convention=v4:exit=head"
"""Connection of DeepSeek-V4 (`connections.convert`), but for its number of streams."""


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a model in the form of this module."""
    return (folder / FILE).is_file() and "model" in _json_or_empty(folder / "config.json")


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder holds the config.json of a Hugging Face model."""
    return "model_type" in _json_or_empty(folder / "config.json")


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write_model(folder: str | Path, config: ExperimentConfig, params: Any, tokenizer: Tokenizer, step: int) -> None:
    """Write a model folder.

    Args:
      folder: a folder that does not exist yet, or is empty.
      config: settings of the run, in which model.vocab_size is not 0.
      params: parameters of the decoder.
      tokenizer: tokenizer of the run.
      step: number of updates by which the parameters were trained.

    Raises:
      InputError: the folder holds something, or cannot be written.
    """
    arrays = {path: np.asarray(a, np.float32) for path, a in flattened(params).items()}
    saved = {f"tokenizer_{key}": text for key, text in tokenizer.saved.items() if key != "content"}
    header = {"format": "mhc_jax", "connection": spec(config.model.connection), "step": str(step)}
    write_folder(folder, arrays, {"config.json": to_mapping(config), **hugging_face_files(tokenizer)}, header | saved)


def read_model(folder: str | Path) -> tuple[ExperimentConfig, dict[str, Any], dict[str, str], int]:
    """Return (settings, parameters, tokenizer, number of updates) of a model folder.

    Parameters are float32 NumPy arrays.  The tokenizer is in the form of `Tokenizer.saved`.

    Raises:
      InputError: a file cannot be read, or the arrays are not those of the model in config.json.
    """
    folder = Path(folder)
    config, tensors = from_mapping(read_json(folder / "config.json")), TensorFiles(folder)
    header = tensors.metadata
    saved = {key.removeprefix("tokenizer_"): text for key, text in header.items() if key.startswith("tokenizer_")}
    require("kind" in saved and header.get("step", "").isdecimal(), f"{folder / FILE} was not written by mhc_jax.")
    if saved["kind"] == "bpe":
        saved["content"] = read_text(folder / "tokenizer.json")
    made = jax.eval_shape(lambda: Decoder(config.model).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    wanted = flattened(made["params"])
    more = sorted({*tensors.shapes} - {*wanted})
    require(not more, f"{folder / FILE} has arrays that the model in config.json has not, such as {(more or [''])[0]}.")
    arrays = {path: tensors.take(path, a.shape).astype(np.float32) for path, a in wanted.items()}
    return config, nested(arrays), saved, int(header["step"])


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from error


def wiring_params(params: Mapping[str, Any]) -> Params:
    """Return the parameters of a decoder's connection in the form of `Wiring.init` with `stacked=True`, as NumPy arrays.

    Branch l is sub-layer l of the decoder.
    """

    def interleaved(attention: Any, mlp: Any) -> np.ndarray:
        both = np.stack([attention, mlp], 1)  # [N, 2, ...]: the two sub-layers of each block
        return both.reshape(-1, *both.shape[2:])

    parts = [params[part] for part in ("dense_layers", "layers") if part in params]
    pairs = [(part.get("attention_connection", {}), part.get("mlp_connection", {})) for part in parts]
    stacks = [jax.tree.map(interleaved, *pair) for pair in pairs]
    branches = jax.tree.map(lambda *arrays: np.concatenate(arrays), *stacks)
    return {"ends": jax.tree.map(np.asarray, params.get("ends", {})), "branches": branches}


def write_connection(folder: str | Path, wiring: Wiring, params: Params) -> None:
    """Write a connection folder, from a wiring and its stacked parameters (`Wiring.init` with `stacked=True`).

    Raises:
      InputError: there are no parameters, the folder holds something, or it cannot be written.
    """
    arrays = {path: np.asarray(a) for path, a in flattened(params).items()}
    require(bool(arrays), f"The connection {wiring.spec!r} has no parameters; there is nothing to write.")
    wanted = flattened(jax.eval_shape(lambda: wiring.init(jax.random.key(0), stacked=True)))
    require(
        {path: a.shape for path, a in arrays.items()} == {path: a.shape for path, a in wanted.items()},
        f"The parameters are not the stacked ones of {wiring.spec!r}; give those of `Wiring.init` with stacked=True.",
    )
    description = {"spec": wiring.spec, "width": wiring.width, "num_branches": wiring.num_branches}
    write_folder(folder, arrays, {CONNECTION_FILE: description}, {"format": "mhc_jax connection"})


def read_connection(folder: str | Path) -> tuple[Wiring, Params]:
    """Return (wiring, stacked parameters) of a connection folder.

    Raises:
      InputError: a file cannot be read, or arrays are missing or have other shapes than the connection needs.
    """
    folder = Path(folder)
    described = read_json(folder / CONNECTION_FILE)
    require(
        {*described} == {"spec", "width", "num_branches"},
        f"{folder / CONNECTION_FILE} must hold spec, width and num_branches alone.",
    )
    wiring, tensors = Wiring(**described), TensorFiles(folder)
    wanted = jax.eval_shape(lambda: wiring.init(jax.random.key(0), stacked=True))
    arrays = {path: jnp.asarray(tensors.take(path, a.shape)) for path, a in flattened(wanted).items()}
    return wiring, {"ends": {}, "branches": {}} | nested(arrays)


def deepseek_v4_connection(folder: str | Path) -> tuple[Wiring, Params, list[str]]:
    """Return (wiring, stacked parameters, names left out) of the connections in a DeepSeek-V4 checkpoint.

    Only the arrays of connections are read, from `model.safetensors` or the shards of its index.  bfloat16 becomes float32.
    Connections outside the blocks and the head, as those of multi-token prediction, are left out.

    Raises:
      InputError: the folder holds no connections of DeepSeek-V4, one of their arrays is missing or has a wrong shape, or it is
        stored in fp8 or another dtype that needs scales.
    """
    tensors = TensorFiles(folder)
    shapes = {name: shape for name, shape in tensors.shapes.items() if re.search(r"(^|[._])hc_", name)}
    prefix = next((name.removesuffix("hc_head_fn") for name in shapes if name.endswith("hc_head_fn")), None)
    if prefix is None or len(shapes[f"{prefix}hc_head_fn"]) != 2:
        raise InputError(f"{folder} has no array hc_head_fn [n, nC]; it holds no connections of DeepSeek-V4.")
    n, nC = shapes[f"{prefix}hc_head_fn"]
    require(n > 0 and nC % n == 0, f"hc_head_fn in {folder} has the shape [{n}, {nC}], and [n, nC] was expected.")
    C, inside = nC // n, re.compile(re.escape(prefix) + r"(layers\.(\d+)\.hc_(attn|ffn)|hc_head)_(fn|base|scale)")
    found = {name: inside.fullmatch(name) for name in shapes}
    layers = 1 + max((int(match[2]) for match in found.values() if match and match[2]), default=-1)
    require(
        layers > 0, f"{folder} has no arrays layers.0.hc_attn_fn and so on; it holds no connections of DeepSeek-V4."
    )
    weights = {
        name.removeprefix(prefix): tensors.take(name, shapes[name]).astype(np.float32) for name in shapes if found[name]
    }
    params = wiring_params(from_deepseek_v4(weights, layers, n, C))
    return (
        Wiring(f"{V4_SPEC}:num_streams={n}", C, 2 * layers),
        params,
        sorted(name for name in shapes if not found[name]),
    )
