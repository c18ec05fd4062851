"""Ask how Muon changes the comparison of residual, HC and mHC: AdamW, Muon, and Muon with connections under AdamW.

    python experiments/sweep.py experiments/sweeps/muon.py --workdir=runs/muon

Each optimizer runs at three learning rates, because a rate that suits one need not suit another.  Expect: Muon's losses are lower
than AdamW's by a few hundredths of a nat per token.  At this size differences between connections are not resolved, and the
largest stable rate needs a search over more rates and seeds.  Cost: 81 runs of 10 to 60 s on 2 CPU cores, twenty minutes in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

KINDS = ["residual", "hc", "mhc:init=home"]


def get_sweep() -> Sweep:
    """Return the sweep: every optimizer, connection and learning rate, with each of three seeds."""
    whole = product(over("optimizer.name", ["adamw", "muon"]), over("connection", KINDS))
    # residual has no connection to keep under AdamW.  It runs again as the baseline of those that have.
    apart = product(
        over("optimizer.name", ["muon"]), over("connection", KINDS), over("optimizer.connections", ["adamw"])
    )
    rates = over("optimizer.learning_rate", [3e-3, 1e-2, 3e-2])
    return Sweep(base="../configs/prototype.py", points=product(whole + apart, rates, seeds(3)))
