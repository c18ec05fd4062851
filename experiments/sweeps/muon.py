"""Ask how Muon changes the comparison of residual, HC and mHC: AdamW, Muon, and Muon with connections under AdamW.

    python experiments/sweep.py experiments/sweeps/muon.py --workdir=runs/muon

Each optimizer runs at three learning rates, because a rate that suits one need not suit another.  Expect: whether a connection gains
over residual can be read at each optimizer's best rate.  At this size the sweep tells large effects only; the largest stable rate
needs a search over rates with more seeds.  Cost: 72 runs of 10 to 60 s on 2 CPU cores, about twenty minutes in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

KINDS = ["residual", "hc", "mhc:init=home"]


def get_sweep() -> Sweep:
    """Return the sweep: every optimizer, connection and learning rate, with each of three seeds."""
    whole = product(over("optimizer.name", ["adamw", "muon"]), over("connection", KINDS))
    # Without a connection that has matrices, as in residual, both ways of Muon are one.
    apart = product(
        over("optimizer.name", ["muon"]), over("connection", KINDS[1:]), over("optimizer.connections", ["adamw"])
    )
    rates = over("optimizer.learning_rate", [3e-3, 1e-2, 3e-2])
    return Sweep(base="../configs/prototype.py", points=product(whole + apart, rates, seeds(3)))
