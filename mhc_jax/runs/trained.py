"""Load a trained model, from the newest checkpoint of its run or from a model folder: configuration, parameters and tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.data.tokenizers import Tokenizer, from_saved, load_tokenizer
from mhc_jax.errors import require
from mhc_jax.files.json_files import read_json
from mhc_jax.parallel.sharding import make_mesh, state_shardings
from mhc_jax.runs.checkpoint import check_tokenizer, load_params, newest_step, saved_tokenizer
from mhc_jax.weights.folder import is_model_folder, read_model


@dataclass(frozen=True)
class Trained:
    """A trained model: the content of the newest checkpoint of a run, or of a model folder."""

    folder: Path
    step: int
    """Number of updates by which the model was trained."""
    config: ExperimentConfig
    params: Any
    """The `params` collection of the decoder, on the mesh or on the first device."""
    tokenizer: Tokenizer
    mesh: Mesh | None


def load_trained(folder: str | Path, tokenizer: str = "") -> Trained:
    """Load the newest checkpoint of a run, or the model in a model folder (`weights.folder`).

    Parameters are sharded as in the run if there are enough devices here.  Otherwise they lie on the first device.

    Args:
      folder: the run folder or model folder.
      tokenizer: name of a tokenizer, as in data.tokenizer.  An empty text means the tokenizer of the model.

    Raises:
      InputError: the folder or its checkpoint is missing, or the model was trained with another tokenizer.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a run or of a converted model.")
    if is_model_folder(folder):
        config, arrays, saved, step = read_model(folder)
        mesh = _mesh(config)
        params = jax.device_put(arrays, None if mesh is None else state_shardings(mesh, arrays, spread=False))
    else:
        saved, step = saved_tokenizer(folder), newest_step(folder)
        # The mesh comes from config.json.  All other settings come from the checkpoint, where model.vocab_size is never 0.
        mesh = _mesh(from_mapping(read_json(folder / "config.json")))
        places = None if mesh is None else functools.partial(state_shardings, mesh, spread=False)
        mapping, params = load_params(folder, places)
        config = from_mapping(mapping)
    chosen = load_tokenizer(tokenizer) if tokenizer else from_saved(saved)
    check_tokenizer(saved["fingerprint"], chosen.fingerprint, folder)
    return Trained(folder, step, config, params, chosen, mesh)


def _mesh(config: ExperimentConfig) -> Mesh | None:
    """Return the mesh of a run, or None if there are too few devices here."""
    return make_mesh(config.mesh) if config.mesh.size <= len(jax.devices()) else None


def beyond_training(name: str, trained: int, context: int) -> str:
    """Return a warning if the model `name` reads more tokens at a time than in training, else an empty text.

    `context` is the number of tokens that it reads, and `trained` is the number of tokens of a training sequence.
    """
    if context <= trained:
        return ""
    return (
        f"{name} was trained on sequences of {trained} tokens and reads up to {context} here; what it says of later "
        "positions is extrapolated."
    )
