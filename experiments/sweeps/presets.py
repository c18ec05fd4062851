"""Compare initial values of mHC's static logits: the presets of `init=`.

    python experiments/sweep.py experiments/sweeps/presets.py --workdir=runs/presets

Expect: the presets differ more in stream cosine than in loss.  Only with `home` do the streams differ from each other.
Cost: 18 runs of 10 to 90 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: residual, and mHC with every preset, with each of three seeds."""
    presets = [f"mhc:init={preset}" for preset in ("home", "paper", "residual", "zeros", "hc")]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", ["residual", *presets]), seeds(3)))
