"""Question 1: which of H_pre, H_post and H_res carries the lower loss of mHC.

    python experiments/sweep.py experiments/sweeps/which_map.py --workdir=runs/which_map --workers=2

Hypotheses.  The mHC paper says that H_res carries most of it (-0.022 of -0.027 nats at 27B).  A fork of modded-nanogpt says that
it is H_post (with H_post frozen its loss is the baseline's, with H_res frozen at I it is mHC's).

Settings.  A full factorial: each of the three maps is learned or fixed (H_pre at 1/n, H_post at 1, H_res at I), in two forms
(dynamic as in mHC, static without phi), in two arms.  In the arm `copy` streams start equal (init=paper, the paper's own).  Where
H_pre is fixed they stay equal, so that H_res cannot act.  In the arm `scaled` streams differ from the embedding on (entry=scaled,
and init=residual, under which a learned map starts at its fixed value, H_res within 0.008).  In each arm and form all cells
therefore start as nearly the same function.  `lanes` and `scalar_gated` are compared with residual.  Config: configs/board.py,
four streams.

Seeds.  Eight, 0 to 7, each with its own parameters and order of the text.  Four earlier runs of mhc:init=paper minus residual,
with seeds 100 to 103, differ with a standard deviation of 0.012.  A single pair of cells then needs 14 seeds to resolve 0.01 nats
with a power of 80 %.  A main effect averages 4 pairs of cells in each of 4 designs (arm and form), and needs fewer.

Rule.  The effect of a map in one design and seed is the mean loss of the four cells that learn it minus the mean of the four that
do not.  Primary: the three effects averaged over the four designs, by paired t tests over seeds with Holm's correction for three.
A map carries the gain if its effect is negative and resolved at 5 %, and its 95 % intervals against both other effects lie below
0.  If no map does, the answer is "not resolved", with the seeds that its difference to the next would need.  Secondary, and
labelled so: every effect and interaction of each design with Holm's correction for all 28, and the comparisons of lanes and
scalar_gated.  Every run counts, and no seed is added after a look.  A run that diverges makes its cell's effects missing, and is
told.

Equal wall clock, secondary: each cell against residual after as much time, by the rule in residual_longer.py.

Cost: 256 runs of 15 to 40 s on 2 CPU cores, about an hour in all.
"""

import itertools

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

MAPS = ("pre", "post", "res")
ARMS = {"copy": "mhc:init=paper", "scaled": "mhc:init=residual:entry=scaled"}


def cell(arm: str, form: str, learned: tuple[str, ...]) -> str:
    """Return the connection of one cell: an arm, a form (`dynamic` or `static`) and the maps that are learned."""
    if arm == "copy" and not learned:
        return "residual"
    fixed = [part for part in MAPS if part not in learned]
    static = form == "static" or not learned
    return ARMS[arm] + ":dynamic=False" * static + (":disable=" + "+".join(fixed) if fixed else "")


def get_sweep() -> Sweep:
    """Return the sweep: every cell of the four designs, and both controls, with each of eight seeds."""
    subsets = [subset for size in range(4) for subset in itertools.combinations(MAPS, size)]
    cells = [cell(*point) for point in itertools.product(ARMS, ("dynamic", "static"), subsets)]
    kinds = dict.fromkeys([*cells, "lanes", "scalar_gated"])
    return Sweep(base="../configs/board.py", points=product(seeds(8), over("connection", list(kinds))))
