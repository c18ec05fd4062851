"""Residual, HC, and mHC from the paper's start and from `home`, three seeds each: losses with the noise of seeds beside them.

    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections
    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections-mix \\
        --config.data.source=texts/train.jsonl.zst --config.data.validation_source=texts/validation.jsonl.zst

Expect: the largest composite gain of HC far above 1 and mHC's near 1; paired differences in loss of a few hundredths of a nat,
of either sign.  With `init=paper` the streams stay nearly equal (cosine near 1), with `init=home` they differ. Cost: 12 runs of
about a minute or two on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Connection x seed."""
    # 8 blocks of width 96 have 1.0M parameters without connections; longer than the protocol's 200 steps, so that the
    # gaps have time to open.
    size = {"model.width": 96, "model.num_layers": 8, "model.mlp_width": 256, "train.steps": 400}
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=paper", "mhc:init=home"]), seeds(3)),
        settings=size | {"data.sequence_length": 96},
    )
