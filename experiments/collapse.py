"""Measure whether the streams of a run are one vector up to sign and scale, by the loss after one vector replaces them.

    python experiments/collapse.py --checkpoint=runs/demo/hc,runs/demo/mhc-init-paper,runs/demo/mhc-init-home

The newest checkpoint of each run is evaluated on the first validation batches of its text.  The loss named `unchanged` is that of
the model as it is.  For the loss named `from l`, the streams that sub-layers l to L read (counted from 1) are replaced, token by
token, by their best rank-one approximation (`mhc_jax.diagnostics.rank_one`).  If both losses are equal, the model uses nothing but
one vector from sub-layer l on.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.analysis.inside import Model, Visitor, run
from mhc_jax.config.mapping import from_mapping
from mhc_jax.connections import spec
from mhc_jax.data import load_data
from mhc_jax.diagnostics import rank_one
from mhc_jax.errors import require
from mhc_jax.model import cross_entropy
from mhc_jax.runs.checkpoint import load_params

CHECKPOINT = flags.DEFINE_list("checkpoint", [], "Run folders, joined with commas.")
BATCHES = flags.DEFINE_integer("batches", 16, "Number of validation batches.", lower_bound=1)


def replaced(first: int, last: int) -> Visitor:
    """Return a visitor that replaces the streams by one vector where sub-layers with the indices `first` to `last` read them."""

    @jax.jit
    def one_vector(x: jax.Array) -> jax.Array:
        flat = rank_one(jnp.concatenate(list(x), -1), len(x))
        return jnp.stack(jnp.split(flat, len(x), -1))

    return lambda sublayer, x: one_vector(x) if first <= sublayer <= last else None


def main() -> int:
    """Print a line with the losses of each run, and return the exit status."""
    require(bool(CHECKPOINT.value), "--checkpoint is empty; give run folders with checkpoints, joined with commas.")
    for folder in map(Path, CHECKPOINT.value):
        mapping, params = load_params(folder)
        config = from_mapping(mapping)
        n = mapping["model"]["connection"].get("num_streams", 1)
        require(n > 1, f"{folder} has one stream; give runs of a connection with several.")
        batches = load_data(config.data).validation_batches(BATCHES.value)
        model, L = (config.model, params), config.model.num_sublayers
        losses = {"unchanged": _loss(model, batches)}
        for first in (0, L // 4, L // 2, 3 * L // 4):
            losses[f"from {first + 1}"] = _loss(model, batches, replaced(first, L - 1))
        listed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"{folder.name} ({spec(config.model.connection)}), validation loss in nats/token: {listed}")
    return 0


def _loss(model: Model, batches, visit: Visitor | None = None) -> float:
    pairs = ((run(model, batch["inputs"], visit), jnp.asarray(batch["targets"])) for batch in batches)
    return float(np.mean([cross_entropy(*pair) for pair in pairs]))


if __name__ == "__main__":
    cli.main(main)
