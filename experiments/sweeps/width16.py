"""Ask whether more than four streams help, and whether the write limits them: n = 4, 8 and 16.

    python experiments/sweep.py experiments/sweeps/width16.py --workdir=runs/width16

xHC (arXiv 2607.14530) claims that mHC stops gaining beyond n = 4 because a sub-layer writes one vector to all streams.  With
`write_rank=r` it writes r vectors.  Expect: losses at n = 8 and 16 that differ from those at n = 4 by about as much as losses
differ between seeds.  Cost: 48 runs of 20 to 180 s on 2 CPU cores, about fifty minutes in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

KINDS = ["hc", "mhc:init=home", "identity:init=home", "mhc:init=home:write_rank=2", "mhc:init=home:write_rank=4"]


def get_sweep() -> Sweep:
    """Return the sweep: residual, and each connection with each number of streams n, with each of three seeds."""
    several = product(over("connection", KINDS), over("model.connection.num_streams", [4, 8, 16]))
    points = over("connection", ["residual"]) + several
    return Sweep(base="../configs/prototype.py", points=product(points, seeds(3)))
