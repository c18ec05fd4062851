"""Ablate the mappings of mHC: none, H_res, H_res and H_pre, all three (mHC Table 1).

    python experiments/sweep.py experiments/sweeps/components.py --workdir=runs/components

The width is 48.  A disabled mapping keeps its fixed value: 1/n for H_pre, 1 for H_post, I for H_res.  mHC and identity start from
`init=home`.  Expect: the gaps in loss are smaller than at scale, and about the noise of seeds.  Cost: 15 runs of 10 to 90 s on 2
cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the sets of disabled mappings with the seeds."""
    # `disable` names the mappings that are off.  `entry` is scaled, because streams that enter as copies and are all written alike
    # stay equal.  H_res alone, and H_res with H_pre, would then give residual's losses to the last digit (experiments/LOG.md).
    bare = "identity:init=home:entry=scaled:disable=pre"
    mhc = "mhc:init=home:entry=scaled"
    connections = ["residual", bare, f"{mhc}:disable=pre+post", f"{mhc}:disable=post", mhc]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", connections), seeds(3)))
