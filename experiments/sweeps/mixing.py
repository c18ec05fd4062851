"""Ask whether a learned H_res is needed: HC and mHC against H_res = I, a scalar-gated residual, and residual.

    python experiments/sweep.py experiments/sweeps/mixing.py --workdir=runs/mixing

Expect: the losses of mHC and identity differ by less than the noise of seeds at this size.  A comparison of HC with the
scalar-gated residual shows how much of HC's improvement in loss a scalar gate gives alone.  Cost: 15 runs of 10 to 60 s on 2
cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the kinds of connection with the seeds."""
    # With init=home each sub-layer reads and writes its home stream, so that streams differ.  If streams are equal, a mixing
    # matrix with unit row sums changes nothing.
    connections = ["residual", "hc", "mhc:init=home", "identity:init=home", "scalar_gated"]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
