"""Ask whether a learned H_res is needed: HC and mHC against H_res = I, a scalar-gated residual, and residual.

    python experiments/sweep.py experiments/sweeps/mixing.py --workdir=runs/mixing

Expect: the losses of mHC and of `identity` (H_res = I) differ less than losses differ between seeds at this size.  A comparison of
HC with the scalar-gated residual shows how much of HC's improvement in loss comes from two learned numbers per sub-layer.
Cost: 15 runs of 10 to 60 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every kind of connection with each of three seeds."""
    # With init=home each sub-layer reads and writes mostly its home stream, so that streams differ.  A mixing matrix whose rows sum
    # to 1 would not change equal streams.
    connections = ["residual", "hc", "mhc:init=home", "identity:init=home", "scalar_gated"]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
