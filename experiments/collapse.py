"""Measure whether the streams of a run are one vector up to sign and scale, by the loss after one vector replaces them.

    python experiments/collapse.py --checkpoint=runs/demo/hc,runs/demo/mhc-init-paper,runs/demo/mhc-init-home

The newest checkpoint of each run is evaluated on the first validation batches of its text.  The loss named `unchanged` is that of
the model as it is.  For the loss named `from l`, the streams that sub-layers l to L read (counted from 1) are replaced, token by
token, by their best rank-one approximation (`mhc_jax.diagnostics.rank_one`).  If both losses are equal, the model uses nothing but
one vector from sub-layer l on.
"""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.config.mapping import from_mapping
from mhc_jax.connections import Connection, spec
from mhc_jax.data import load_data
from mhc_jax.diagnostics import rank_one
from mhc_jax.errors import require
from mhc_jax.runs.checkpoint import load_params
from mhc_jax.train_step import make_eval_step

CHECKPOINT = flags.DEFINE_list("checkpoint", [], "Run folders, joined with commas.")
BATCHES = flags.DEFINE_integer("batches", 16, "Number of validation batches.", lower_bound=1)


def replaced(n: int, first: int) -> nn.module.Interceptor:
    """Return a Flax interceptor that replaces the streams by one vector before sub-layers from `first` on use them.

    Args:
      n: number of streams.
      first: index, from 0, of the first sub-layer that gets the replaced streams.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, Connection) or context.method_name != "write_read":
            return call(*args, **kwargs)
        streams = module.write(*args)
        require(
            isinstance(streams, jax.Array),
            f"`{module.config.kind}` carries more than its streams; give runs of another.",
        )
        streams = jnp.where(jnp.asarray(module.sublayer) >= first, rank_one(streams, n), streams)
        c = module.coefficients(streams)
        return streams, c, module.read(streams, c)

    return intercept


def main() -> int:
    """Print a line with the losses of each run, and return the exit status."""
    require(bool(CHECKPOINT.value), "--checkpoint is empty; give run folders with checkpoints, joined with commas.")
    for folder in map(Path, CHECKPOINT.value):
        mapping, params = load_params(folder)
        config = from_mapping(mapping)
        n = mapping["model"]["connection"].get("num_streams", 1)
        require(n > 1, f"{folder} has one stream; give runs of a connection with several.")
        config = dataclasses.replace(config, mesh=type(config.mesh)())
        batches = load_data(config.data).validation_batches(BATCHES.value)
        L = 2 * config.model.num_layers
        step = make_eval_step(config)
        losses = {"unchanged": _loss(step, params, batches)}
        for first in (0, L // 4, L // 2, 3 * L // 4):
            with nn.intercept_methods(replaced(n, first)):
                losses[f"from {first + 1}"] = _loss(step, params, batches)
        listed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"{folder.name} ({spec(config.model.connection)}), validation loss in nats/token: {listed}")
    return 0


def _loss(step, params, batches) -> float:
    # The lambda is a new function in every call, so jax traces the step again, with the interceptor that is now in force.
    compiled = jax.jit(lambda params, batch: step(params, batch))
    return float(np.mean([compiled(params, batch) for batch in batches]))


if __name__ == "__main__":
    cli.main(main)
