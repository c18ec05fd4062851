"""Ask whether the number of streams matters: HC and mHC (`init=home`) with n = 1, 2, 4, 8.

    python experiments/sweep.py experiments/sweeps/width.py --workdir=runs/width

Expect: mHC's forward gain is 1 at every n.  Losses at n = 2, 4 and 8 differ by about the noise of seeds.
Cost: 27 runs of 10 to 90 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the connections with the numbers of streams n and the seeds.  Residual has no n."""
    # With n = 1 there is no home stream to tell apart, so mHC has the preset `init=paper` at n = 1.
    single = over("connection", ["hc:num_streams=1", "mhc:num_streams=1:init=paper"])
    several = product(over("connection", ["hc", "mhc:init=home"]), over("model.connection.num_streams", [2, 4, 8]))
    points = over("connection", ["residual"]) + single + several
    return Sweep(base="../configs/prototype.py", points=product(points, seeds(3)))
