"""Measure the loss of residual, HC and mHC (`init=home`) at four model sizes, against training FLOPs (a compute ladder).

    python experiments/sweep.py experiments/sweeps/ladder.py --workdir=runs/ladder

Expect: the loss falls with compute along nearly parallel curves.  Four sizes with one seed are too few to tell the exponents of the
curves apart.  Cost: 12 runs of 10 s to a few minutes on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds, zip_points


def get_sweep() -> Sweep:
    """Return the sweep: every connection with every model size, with one seed."""
    # Width, depth and number of steps grow together.  Heads are 8 to 24 channels wide.
    sizes = zip_points(
        over("model.width", [32, 48, 64, 96]),
        over("model.mlp_width", [88, 128, 176, 256]),
        over("model.num_layers", [6, 8, 10, 12]),
        over("train.steps", [150, 200, 300, 400]),
    )
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=home"]), sizes, seeds(1)),
    )
