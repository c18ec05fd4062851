"""Question 3: does mHC's margin in learning rate survive Muon?  The largest stable rate, by bisection.

    python experiments/sweep.py experiments/sweeps/muon_margin.py --workdir=runs/muon_margin --workers=2

Hypothesis. mHC is said to stand higher learning rates than HC and residual.  All reports are of AdamW, where each entry of a
mixing matrix moves by up to the rate in a step.  Muon's steps have another size and another direction.

Settings. residual, HC, mHC and H_res = I (both init=paper), under AdamW, under Muon, and under Muon with the connections under
AdamW; with clipping at a gradient norm of 1, and without.  Twelve rates from 1e-3 to 2.048, each twice the one before.  Config:
configs/prototype.py (200 steps, 20 of warm-up, then a cosine to 10 %).

Rule for a run.  Stable: it finished with a validation loss below 3.3 nats a byte, about what a model of the frequencies of single
bytes has (3.34).  Each line of rates (connection, optimizer, clipping, seed) is bisected by itself, which takes for granted that
rates above an unstable one are unstable.

Seeds.  Four, 0 to 3.  A line's result is a multiple of a factor of 2, so the smallest step of a mean over seeds is a quarter of
that.

Rule.  The margin of a connection is log2 of its largest stable rate over that of residual, under the same optimizer (Muon for
both variants of Muon), clipping and seed.  Primary: mHC's margin, the mean over both clippings, one number a seed, under AdamW,
Muon and Muon with AdamW for connections; paired t tests with Holm's correction for three.  There is a margin if it is above 0 and
resolved at 5 %.  Rates are powers of 2, so that all seeds may have the same margin; without spread there is no t test, and the
margin then counts as resolved.  It survives Muon if there is one under Muon; it is lost if AdamW has one, Muon has none, and the
95 % interval of the difference excludes 0; else not resolved.  A line whose every rate is stable, or none, gives a bound; a
decision that the bound could overturn is not resolved.  Secondary: HC and identity, and each clipping by itself. muon_rates.py
gives surges and best losses.

Cost: about 320 runs of 10 to 25 s on 2 CPU cores, 50 minutes in all.
"""

from mhc_jax.sweeps.bisection import Bisection
from mhc_jax.sweeps.grid import Point, Sweep, over, product, seeds

RATES = [1e-3 * 2**k for k in range(12)]
KINDS = ("hc", "mhc:init=paper", "identity:init=paper")
LOSS_BELOW = 3.3


def optimizers() -> list[Point]:
    """Return every connection with every optimizer.  residual has no connections to keep under AdamW."""
    whole = product(over("optimizer.name", ["adamw", "muon"]), over("connection", ["residual", *KINDS]))
    apart = over("connection", list(KINDS))
    return whole + product(over("optimizer.name", ["muon"]), apart, over("optimizer.connections", ["adamw"]))


def get_sweep() -> Sweep:
    """Return the sweep: every line of rates, of which the bisection trains three or four."""
    rates = over("optimizer.learning_rate", RATES)
    return Sweep(
        base="../configs/prototype.py",
        points=product(seeds(4), over("optimizer.grad_clip", [1.0, 0.0]), optimizers(), rates),
        settings={"train.log_every": 1, "train.validate_every": 200, "train.checkpoint_every": 200},
        bisection=Bisection("optimizer.learning_rate", loss_below=LOSS_BELOW),
    )
