"""Start a run from the parameters, or the whole train state, of another run or of a converted model (train.init_from).

The model of the other folder must have the same branches.  Its connection may be another one if the run then begins as the same
function.  Logits at step 0 are compared, and the run is refused if they differ.  So a residual model can be given streams of every
kind that starts as Pre-Norm, such as `identity`, `mhc:init=paper` and `hc`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from mhc_jax.config import ExperimentConfig, ModelConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.connections import spec
from mhc_jax.connections.parameter_paths import CONNECTION, path_of
from mhc_jax.data import Data
from mhc_jax.errors import InputError, require, user_path
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import state_shardings
from mhc_jax.runs.checkpoint import check_tokenizer, load_params, load_state, newest_step, saved_config, saved_tokenizer
from mhc_jax.runs.folder import differences
from mhc_jax.runs.programs import abstract_state, first_state, replicated
from mhc_jax.train_step import TrainState
from mhc_jax.weights.folder import is_model_folder, read_model

FREE = ("remat", "unroll", "attention", "compute_dtype", "stream_dtype", "embedding_init_std", "depth_scaled_init")
"""Settings of the model that may differ between both runs, besides the connection: they change no parameter."""
TOLERANCE = 1e-5
"""Largest difference of a logit at step 0 between both models, as a multiple of the largest logit or of 1."""


@dataclass(frozen=True)
class WarmStart:
    """What a run takes from another folder."""

    state: TrainState
    step: int
    """Number of updates with which the run begins."""
    data_state: dict[str, Any] | None
    """State of the iterator over training batches; None: the run begins at the start of its text."""
    source: dict[str, Any]
    """Entry `init_from` of env.json: folder, step and connection of the other model, and what was taken."""
    remark: str
    """A line for the log."""


@dataclass(frozen=True)
class _Source:
    folder: Path
    config: ExperimentConfig
    params: Any
    tokenizer: Mapping[str, str]
    step: int


def warm_start(config: ExperimentConfig, mesh: Mesh | None, data: Data) -> WarmStart:
    """Load the folder train.init_from, and make the train state with which the run begins.

    Args:
      config: configuration of the run, with model.vocab_size set.
      mesh: mesh of the run, or None.  It must be the current one (`sharding.using`).
      data: text of the run.

    Raises:
      InputError: the folder cannot be read, its model has other branches or another tokenizer, the logits at step 0 would differ,
        or its train state does not fit this run.
    """
    folder = user_path(config.train.init_from)
    require(
        folder.is_dir(), f"train.init_from is {str(folder)!r}, which is no folder; give that of a run or of a model."
    )
    everything, converted = config.train.init_state == "all", is_model_folder(folder)
    require(
        not (everything and converted),
        f"train.init_state is 'all', and {folder} is a converted model without a state of the optimizer; use 'parameters'.",
    )
    source = _read_model(folder) if converted else _read_run(folder, mesh)
    check_tokenizer(source.tokenizer["fingerprint"], data.tokenizer.fingerprint, folder)
    _check_branches(source, config.model)
    before, after = spec(source.config.model.connection), spec(config.model.connection)
    abstract = abstract_state(config, mesh)
    taken = {"folder": str(folder), "step": source.step, "connection": before, "state": config.train.init_state}
    if everything:
        state, data_state, remark = _whole_state(source, config, data, abstract)
        return WarmStart(state, int(state.step), data_state, taken, remark)
    fresh = first_state(config, mesh, abstract)
    params, kept = _merged(source, fresh.params, abstract.params)
    if before != after:
        tokens = data.validation_batches(1, np.arange(1))[0]["inputs"]
        _check_logits(source, config, params, tokens, mesh)
    # The state of the optimizer is zeros, whatever the parameters are.
    state = TrainState(fresh.step, params, fresh.opt_state)
    remark = f"starting from the parameters of {folder} (step {source.step}, {before})"
    if before != after:
        remark += f" under {after}" if kept else f", with those of {after} new"
    return WarmStart(state, 0, None, taken, remark)


def settings_of(folder: Path) -> ExperimentConfig:
    """Return the settings of a run or of a converted model, with train.init_from set to its folder.

    model.vocab_size is not 0.

    Raises:
      InputError: the folder is neither.
    """
    folder = user_path(folder)
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give that of a run or of a converted model.")
    config = read_model(folder)[0] if is_model_folder(folder) else from_mapping(saved_config(folder))
    return config.with_settings(train={"init_from": str(folder), "init_state": "parameters"})


def _read_model(folder: Path) -> _Source:
    config, params, tokenizer, step = read_model(folder)
    return _Source(folder, config, params, tokenizer, step)


def _read_run(folder: Path, mesh: Mesh | None) -> _Source:
    tokenizer, step = saved_tokenizer(folder), newest_step(folder)
    mapping, params = load_params(folder, None if mesh is None else lambda shapes: state_shardings(mesh, shapes))
    return _Source(folder, from_mapping(mapping), params, tokenizer, step)


def _check_branches(source: _Source, model: ModelConfig) -> None:
    """Raise `InputError` unless both models have the same branches, embeddings and final norm."""
    compared = [f.name for f in fields(ModelConfig) if f.name not in (*FREE, "connection")]
    theirs, ours = ({name: getattr(m, name) for name in compared} for m in (source.config.model, model))
    if changed := differences(theirs, ours, "model."):
        raise InputError(
            f"The model in {source.folder} is another one ({'; '.join(changed[:6])}); give this run the same settings, as "
            f"--config=experiments/configs/warm_start.py:{source.folder} does."
        )


def _merged(source: _Source, fresh: Any, abstract: Any) -> tuple[Any, bool]:
    """Return the parameters with which the run begins, with the shardings of `abstract`, and whether all are the other model's.

    The parameters of the connection are those of the other model if they have the same paths and shapes, else new ones.
    """
    old = {path_of(path): a for path, a in jax.tree_util.tree_leaves_with_path(source.params)}
    new = {path_of(path): a for path, a in jax.tree_util.tree_leaves_with_path(fresh)}
    inside = [{path: a.shape for path, a in tree.items() if re.search(CONNECTION, path)} for tree in (old, new)]
    kept = inside[0] == inside[1]

    def pick(path: Any, a: Any, like: Any) -> Any:
        name = path_of(path)
        return jax.device_put(old[name], like.sharding) if kept or name not in inside[1] else a

    return jax.tree_util.tree_map_with_path(pick, fresh, abstract), kept


def _check_logits(
    source: _Source, config: ExperimentConfig, params: Any, tokens: Int[np.ndarray, "B T"], mesh: Mesh | None
) -> None:
    """Raise `InputError` if the logits at `tokens` differ between both models, in float32."""
    alike = {"compute_dtype": "float32", "stream_dtype": "float32", "attention": "xla", "remat": "none"}
    quick: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def logits(model: ModelConfig, params: Any) -> np.ndarray:
        decoder = Decoder(replace(model, **alike))
        run = jax.jit(lambda p, t: decoder.apply({"params": p}, t)[0], out_shardings=replicated(mesh))
        return np.asarray(run.lower(params, tokens).compile(quick)(params, tokens))

    before, after = source.config.model.connection, config.model.connection
    theirs, ours = logits(replace(config.model, connection=before), source.params), logits(config.model, params)
    difference, largest = float(np.abs(theirs - ours).max()), max(1.0, float(np.abs(theirs).max()))
    if not difference <= TOLERANCE * largest:
        raise InputError(
            f"The run would not begin as the model in {source.folder}: with {spec(after)} instead of {spec(before)}, logits "
            f"differ by up to {difference:.3g}, and the largest is {largest:.3g}; use the same connection, or go from residual to "
            "a kind that starts as Pre-Norm: identity, hc or mhc:init=paper, and hc:exit=mean or mhc:init=residual if "
            "model.norm_eps is not far below the mean square of the embeddings."
        )


def _whole_state(
    source: _Source, config: ExperimentConfig, data: Data, abstract: TrainState
) -> tuple[TrainState, dict[str, Any] | None, str]:
    """Return (train state, state of the iterator over batches or None, line for the log) for train.init_state `all`."""
    theirs, folder = source.config, source.folder
    require(
        theirs.model.connection == config.model.connection,
        f"train.init_state is 'all', and {folder} has the connection {spec(theirs.model.connection)} instead of "
        f"{spec(config.model.connection)}; use the same connection, or 'parameters'.",
    )
    shape = {
        name: (getattr(theirs.data, name), getattr(config.data, name)) for name in ("batch_size", "sequence_length")
    }
    for name, (old, new) in shape.items():
        require(
            old == new,
            f"train.init_state is 'all', and data.{name} is {new} instead of the {old} of {folder}; use {old}, or 'parameters'.",
        )
    old, new = (
        (o.name, o.connections, o.grad_clip > 0, o.connection_lr_multiplier != 1)
        for o in (theirs.optimizer, config.optimizer)
    )
    require(
        old == new,
        f"train.init_state is 'all', and the state of the optimizer in {folder} has other parts: it has optimizer.name {old[0]!r}, "
        f"optimizer.connections {old[1]!r}, {'' if old[2] else 'no '}clipping and {'a' if old[3] else 'no'} multiplier for "
        "connections; use these, or 'parameters'.",
    )
    require(
        source.step < config.train.steps,
        f"train.steps is {config.train.steps}, and {folder} has done {source.step} steps already; give more.",
    )
    state, loop = load_state(folder, abstract)
    same = theirs.data.seed == config.data.seed and loop["text"]["train_sha256"] == data.identity["train_sha256"]
    text = "at its position in the text" if same else "at the start of this run's text"
    return state, loop["data"] if same else None, f"going on from step {source.step} of {folder}, {text}"
