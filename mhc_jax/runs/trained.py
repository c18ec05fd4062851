"""A trained model as its checkpoint has it: configuration, parameters, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import completed, from_mapping, to_mapping
from mhc_jax.data.tokenizers import Tokenizer, from_saved, load_tokenizer
from mhc_jax.errors import require
from mhc_jax.parallel.sharding import make_mesh, state_shardings
from mhc_jax.runs.checkpoint import check_tokenizer, load_params, newest_step, saved_tokenizer
from mhc_jax.runs.folder import read_json, recorded_data


@dataclass(frozen=True)
class Trained:
    """The newest checkpoint of a run."""

    folder: Path
    step: int
    config: ExperimentConfig
    params: Any
    """Under `params` of the decoder; on the mesh, or on the first device."""
    tokenizer: Tokenizer
    mesh: Mesh | None


def load_trained(folder: str | Path, tokenizer: str = "") -> Trained:
    """Load a run folder's newest checkpoint, sharded as the run was where there are as many devices, else on one.

    Args:
      folder: of the run.
      tokenizer: as data.tokenizer; empty: the one in the checkpoint, or, where it is older than that, the run's by its name.

    Raises:
      InputError: no folder or checkpoint, or a tokenizer that the model was not trained with.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a run.")
    saved, step = saved_tokenizer(folder), newest_step(folder)
    # The run's own configuration says how it was sharded; that of the checkpoint has the size of the vocabulary.
    known = to_mapping(ExperimentConfig())
    mapping, file = None, folder / "config.json"
    if file.is_file():
        mapping = from_mapping(completed(read_json(file), known))
    mesh = make_mesh(mapping.mesh) if mapping and mapping.mesh.size <= len(jax.devices()) else None
    shardings = None if mesh is None else (lambda shapes: state_shardings(mesh, shapes))
    config, params = load_params(folder, shardings)
    config = from_mapping(completed(config, known))
    if tokenizer or saved is None:
        chosen = load_tokenizer(tokenizer or config.data.tokenizer)
        check_tokenizer(
            saved["fingerprint"] if saved else recorded_data(folder).get("fingerprint"), chosen.fingerprint, folder
        )
    else:
        chosen = from_saved(saved)
    require(
        chosen.vocab_size <= config.model.vocab_size,
        f"The tokenizer has {chosen.vocab_size} tokens and the model of {folder} {config.model.vocab_size}; use the run's own.",
    )
    return Trained(folder, step, config, params, chosen, mesh)


def beyond_training(name: str, trained: int, context: int) -> str:
    """A sentence where a model reads more tokens than its training's sequences had; else an empty string."""
    if context <= trained:
        return ""
    return (
        f"{name} was trained on sequences of {trained} tokens and reads up to {context} here; what it says of later "
        "positions is extrapolated."
    )
