"""What H_res does in a trained model: how far it mixes, and how much the loss rises if the identity replaces it.

The model is not trained on.  The rise says what the trained model uses, and not what a model without H_res would reach.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mhc_jax.analysis.run_reader import RunRecord
from mhc_jax.config import ExperimentConfig
from mhc_jax.data import Data, load_data
from mhc_jax.errors import require
from mhc_jax.runs.trained import load_trained
from mhc_jax.train_step import make_eval_step


def off_diagonal(run: RunRecord) -> tuple[float, float]:
    """Return the share of H_res's weight that lies off its diagonal, at the first and at the last diagnostics step of a run.

    It is the sum of the absolute entries off the diagonal over n, of H_res as the diagnostics hold it (a mean over tokens), in the
    mean over sub-layers.  The identity has 0, and H_res whose entries are all 1 / n has 1 - 1 / n.  It is a share where the
    absolute entries of a row sum to 1, as in doubly stochastic matrices.

    Raises:
      InputError: the run has no diagnostics of H_res.
    """
    measured = [line["h_res"] for line in run.diagnostics if "h_res" in line]
    require(
        bool(measured), f"{run.folder} has no diagnostics of H_res; give the folder of its run, with metrics.jsonl."
    )
    shares = []
    for h_res in (measured[0], measured[-1]):
        size = np.abs(np.asarray(h_res, np.float64))
        n = size.shape[-1]
        shares.append(float((size * (1 - np.eye(n))).sum((-2, -1)).mean() / n))
    return shares[0], shares[1]


def without_mixing(config: ExperimentConfig, params: Any) -> tuple[ExperimentConfig, Any]:
    """Return the configuration and parameters of a decoder with `mhc` connections, with H_res fixed at the identity.

    H_pre and H_post are those of the given decoder.  The columns of phi and the entries of alpha and bias for H_res are cut off,
    which come last.

    Raises:
      InputError: the connection is not `mhc`, or its H_res, H_pre or H_post is not learned.
    """
    connection = config.model.connection
    require(
        connection.kind == "mhc" and connection.parts == ("pre", "post", "res"),
        f"The connection is {connection.kind!r} with {', '.join(connection.parts) or 'nothing'} learned; H_res can be frozen in "
        "a model of `mhc` that learns pre, post and res.",
    )
    n = connection.num_streams
    kept = {"phi": (..., slice(2 * n)), "bias": (..., slice(2 * n)), "alpha": (..., slice(2))}

    def cut(path: tuple[Any, ...], value: Any) -> Any:
        names = [entry.key for entry in path]
        in_connection = any(name.endswith("_connection") for name in names)
        return value[kept[names[-1]]] if in_connection and names[-1] in kept else value

    frozen = config.with_settings(model={"connection": dataclasses.replace(connection, disable=("res",))})
    return frozen, jax.tree_util.tree_map_with_path(cut, params)


def validation_loss(config: ExperimentConfig, params: Any, data: Data) -> float:
    """Return the mean loss over the validation batches of a run, in nats/token, as training measures it."""
    step = jax.jit(make_eval_step(config))
    batches = data.validation_batches(config.train.validation_batches)
    return float(np.mean([float(step(params, batch)) for batch in batches]))


def rise_when_frozen(folder: str | Path, data: Data | None = None) -> tuple[float, float]:
    """Return the validation loss of a trained run, and that with H_res fixed at the identity, both in nats/token.

    Args:
      folder: the run folder.
      data: the text of the run.  None means that it is loaded here.

    Raises:
      InputError: the folder holds no trained model of `mhc`, or `without_mixing` raises it.
    """
    model = load_trained(folder)
    frozen, params = without_mixing(model.config, model.params)
    data = data or load_data(model.config.data)
    return validation_loss(model.config, model.params, data), validation_loss(frozen, params, data)
