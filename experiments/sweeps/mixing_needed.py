"""Question 2: is a learned H_res needed once streams differ?

    python experiments/sweep.py experiments/sweeps/mixing_needed.py --workdir=runs/mixing_needed --workers=2

Hypotheses.  The mHC paper needs H_res.  Reports from 1.7B and 8B, marin and a fork of modded-nanogpt find H_res = I as good.

Settings. mHC, H_res = I (`identity`), a diagonal H_res, a blend of identity and mHC (`identity_mix`), and exact doubly stochastic
matrices (`go_mhc`), each with 4 and 8 streams and with the entries `copy` and `scaled`.  All have init=home, under which
sub-layers write to their home streams, so that streams differ and H_res can act.  The kinds differ in H_res alone.  Config:
configs/board.py.

Seeds.  Ten, 0 to 9.  Four earlier runs of `identity` minus `mhc` (n = 4, copy; seeds 100 to 103) differ with a standard deviation
of 0.010.  If the four combinations of streams and entry are independent, their mean has 0.005, and ten seeds show equivalence
within 0.005 nats with a power of 80 % if the kinds do not differ at all.

Rule.  Primary: for `identity` and then for the three others, the difference from mHC averaged over the four combinations, one
number a seed.  Two one-sided t tests (TOST) at 5 %, with a margin of 0.005 nats: equivalent if the 90 % interval lies within the
margin; different if the 95 % interval of the paired t test with Holm's correction for four excludes 0; both may hold; else not
resolved, with the seeds that it would need.  Secondary: each combination by itself.  H_res is called not needed if `identity` is
equivalent or lower, and needed if it is different, higher and not equivalent.  Every run counts, and no seed is added after a
look.

Equal wall clock, secondary: each cell against residual after as much time, by the rule in residual_longer.py.

Freezing.  `python experiments/answers.py --freeze=runs/mixing_needed` replaces H_res by I in each trained mHC model, without
training on, and reports the rise of its validation loss.  It says what a trained model uses, not what training needs.

Cost: 200 runs of 20 to 60 s on 2 CPU cores, a bit more than an hour in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

KINDS = ("mhc", "identity", "diagonal", "identity_mix", "go_mhc")
ENTRIES = ("copy", "scaled")
STREAMS = (4, 8)


def cell(kind: str, entry: str, streams: int) -> str:
    """Return the connection of one cell."""
    return f"{kind}:init=home:entry={entry}:num_streams={streams}"


def get_sweep() -> Sweep:
    """Return the sweep: every kind with both entries and both numbers of streams, with each of ten seeds."""
    cells = [cell(kind, entry, streams) for streams in STREAMS for entry in ENTRIES for kind in KINDS]
    return Sweep(
        base="../configs/board.py",
        points=product(seeds(10), over("connection", cells)),
        baseline={"connection": cell("mhc", "copy", 4)},
    )
