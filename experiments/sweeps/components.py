"""Which of mHC's mappings works: none, H_res, H_res and H_pre, all three (mHC Table 1).

    python experiments/sweep.py experiments/sweeps/components.py --workdir=runs/components

The ablation at a width of 48: a mapping that is disabled stays at its fixed value (pre 1/n, post 1, res I).  Expect: gaps smaller
than at scale and of the size of the seeds' noise.  mHC and identity start from `init=home`. Cost: 15 runs of 10 to 90 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Disabled parts x seed."""
    # disable= names what is off.  entry=scaled, because streams that enter as copies and are all written alike stay equal: H_res
    # alone, and H_res with H_pre, then give residual's losses to the last digit (experiments/LOG.md).
    bare = "identity:init=home:entry=scaled:disable=pre"
    mhc = "mhc:init=home:entry=scaled"
    connections = ["residual", bare, f"{mhc}:disable=pre+post", f"{mhc}:disable=post", mhc]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
