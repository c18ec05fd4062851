"""Ablate the coefficients of mHC: learn H_post alone, H_res alone, H_res and H_pre, or all three (after mHC Table 1).

    python experiments/sweep.py experiments/sweeps/components.py --workdir=runs/components

The width is 48.  Coefficients that are not learned are fixed: H_pre at 1/n, H_post at 1, H_res at I.  mHC and `identity` have the
preset `init=home`.  Expect: losses differ less than in large models, and about as much as losses differ between seeds.
Cost: 15 runs of 10 to 90 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: residual, and every set of learned coefficients, with each of three seeds."""
    # `disable` names the coefficients that are not learned.  `entry=scaled` makes the streams differ from the start.  Equal
    # streams would stay equal where H_post is fixed, and the losses would equal those of `residual` to four digits
    # (experiments/LOG.md).
    bare = "identity:init=home:entry=scaled:disable=pre"
    mhc = "mhc:init=home:entry=scaled"
    connections = ["residual", bare, f"{mhc}:disable=pre+post", f"{mhc}:disable=post", mhc]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
