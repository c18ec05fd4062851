"""Ablate the mappings of mHC: none, H_res, H_res and H_pre, all three (mHC Table 1).

    python experiments/sweep.py experiments/sweeps/components.py --workdir=runs/components

The width is 48.  A mapping that is disabled stays at its fixed value (pre 1/n, post 1, res I).  mHC and identity start from
`init=home`.  Expect: gaps smaller than at scale, and of the size of the noise of seeds.  Cost: 15 runs of 10 to 90 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Cross the disabled mappings with the seeds."""
    # `disable` names the mappings that are off.  `entry` is scaled, because streams that enter as copies stay equal if all are
    # written alike.  H_res alone, and H_res with H_pre, would then give residual's losses to the last digit (experiments/LOG.md).
    bare = "identity:init=home:entry=scaled:disable=pre"
    mhc = "mhc:init=home:entry=scaled"
    connections = ["residual", bare, f"{mhc}:disable=pre+post", f"{mhc}:disable=post", mhc]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
