"""A compute ladder: four sizes of model; residual, HC and mHC (`init=home`); loss against training FLOPs.

    python experiments/sweep.py experiments/sweeps/ladder.py --workdir=runs/ladder

Expect: loss falls with compute along nearly parallel curves; four points and one seed fit a power law with wide intervals and
decide nothing about the exponents. Cost: 12 runs from 10 s to a few minutes on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds, zip_points


def get_sweep() -> Sweep:
    """Size x connection, one seed."""
    # Width, depth and steps grow together; head width 12 to 24.
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
