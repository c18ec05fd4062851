"""Ask whether the number of streams matters: HC and mHC (`init=home`) with n = 1, 2, 4, 8.

    python experiments/sweep.py experiments/sweeps/width.py --workdir=runs/width

Expect: mHC's forward gain is 1 at every n.  Losses at n = 2, 4 and 8 differ about as much as losses differ between seeds.
Cost: 27 runs of 10 to 90 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: residual, and HC and mHC with every number of streams n, with each of three seeds."""
    # The preset `home` needs more than one stream, so mHC has the preset `paper` at n = 1.
    single = over("connection", ["hc:num_streams=1", "mhc:num_streams=1:init=paper"])
    several = product(over("connection", ["hc", "mhc:init=home"]), over("model.connection.num_streams", [2, 4, 8]))
    points = over("connection", ["residual"]) + single + several
    return Sweep(base="../configs/prototype.py", points=product(points, seeds(3)))
