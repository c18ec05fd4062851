"""Climb a compute ladder: the loss of residual, HC and mHC (`init=home`) at four sizes, against training FLOPs.

    python experiments/sweep.py experiments/sweeps/ladder.py --workdir=runs/ladder

Expect: the loss falls with compute along nearly parallel curves.  A power law through four points of one seed has wide
intervals, which decide nothing about the exponents.  Cost: 12 runs of 10 s to a few minutes on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds, zip_points


def get_sweep() -> Sweep:
    """Return the sweep that crosses the connections with the sizes, with one seed."""
    # Width, depth and steps grow together; heads are 8 to 24 channels wide.
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
