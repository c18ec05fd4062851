"""Write trained models of the board as model folders (`weights.folder`), small enough to lie beside the code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from mhc_jax.errors import require
from mhc_jax.runs.trained import load_trained
from mhc_jax.sweeps.results import run_status
from mhc_jax.weights.folder import write_model
from mhc_jax.weights.tensor_files import require_free

MODELS = ("residual", "hc", "mhc-init-home")
"""Entries of which models are written."""
MOST_BYTES = 12_000_000
"""Largest size of all models together."""


def write_models(workdir: Path, folder: Path, steps: int, names: Sequence[str] = MODELS) -> list[Path]:
    """Write the models of seed 0 with equal tokens to `folder`/NAME, and return their folders.

    Args:
      workdir: working folder of the board, with the runs `workdir`/NAME/steps<S>-seed0.
      folder: folder of the models.
      steps: number S of steps with equal tokens.
      names: names of the entries.

    Raises:
      InputError: a run has not finished, a folder of a model holds something, or the models are larger than `MOST_BYTES` together.
    """
    runs = {name: workdir / name / f"steps{steps}-seed0" for name in names}
    for name, run in runs.items():
        require(
            run_status(run.parent, run.name) == "finished",
            f"{run} is no finished run; train it by `python experiments/board.py enter` with the connection of {name}.",
        )
        require_free(folder / name)
    models = {name: load_trained(run) for name, run in runs.items()}
    size = sum(4 * array.size for model in models.values() for array in jax.tree.leaves(model.params))
    require(
        size <= MOST_BYTES, f"The models have {size:,} bytes together; at most {MOST_BYTES:,} are meant to be kept."
    )
    for name, model in models.items():
        write_model(folder / name, model.config, jax.device_get(model.params), model.tokenizer, model.step)
    return [folder / name for name in names]
