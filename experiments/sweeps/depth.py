"""Measure the composite gain against depth: residual, HC and mHC (`init=home`) with 8 to 256 sub-layers.

    python experiments/sweep.py experiments/sweeps/depth.py --workdir=runs/depth

Expect: HC's composite gain grows with depth.  mHC's stays at 1 forward and slightly above 1 backward.
Cost: 54 runs of 10 s to several minutes on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection with every number of blocks and each of three seeds."""
    # A block has two sub-layers.  Runs have only 80 steps, so that the run with 256 sub-layers takes minutes.
    return Sweep(
        base="../configs/prototype.py",
        points=product(
            over("connection", ["residual", "hc", "mhc:init=home"]),
            over("model.num_layers", [4, 8, 16, 32, 64, 128]),
            seeds(3),
        ),
        settings={"train.steps": 80, "train.validate_every": 80, "train.diagnostics_every": 40},
    )
