"""Question 1 where streams differ: which of H_pre, H_post and H_res lowers the loss of mHC with init=home.

    python experiments/sweep.py experiments/sweeps/which_map_home.py --workdir=runs/which_map_home --workers=2

Reason.  In all cells of which_map.py the streams stayed nearly one vector, so that H_pre and H_res could hardly act.  This sweep
was written after the results of which_map.py, and committed before its own first run.

Settings.  mhc:init=home, under which a sub-layer reads and writes mostly its home stream, so that streams differ.  A full
factorial of the three dynamic maps: each is learned, or frozen at its start.  The optimizer freezes a map: functions in this file
wrap AdamW and set the updates of its columns of phi and its entries of alpha and bias to 0.  All eight cells therefore start as
exactly the same function, with the same parameters and cost.  The norm at which gradients are clipped counts frozen maps too.
Weight decay reaches frozen columns of phi as well, and changes nothing, because they start at 0.
Config: configs/board.py, four streams.

Seeds.  Eight, 0 to 7, as in which_map.py.

Rule.  The effect of a map is defined as in which_map.py, in this design alone.  Primary: three effects, by paired t tests over
seeds with Holm's correction for three.  A map carries the lower loss if its effect is negative and resolved at 5 %, and its 95 %
intervals against both other effects lie below 0.  Secondary: interactions, and the loss with all maps learned minus the loss with
none.  Every run counts, and no seed is added after a look.  If a run has no finite final loss, its seed leaves the effects and
interactions; the difference between all maps and none leaves out a seed only if one of these two runs is lost.

Cost: 64 runs of 15 to 40 s on 2 CPU cores, a quarter to half an hour in all.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax

from mhc_jax.config import OptimizerConfig
from mhc_jax.sweeps.grid import Sweep, over, product, seeds

FILE = "experiments/sweeps/which_map_home.py"
MAPS = ("pre", "post", "res")
STREAMS = 4
COLUMNS = {"pre": slice(0, STREAMS), "post": slice(STREAMS, 2 * STREAMS), "res": slice(2 * STREAMS, None)}
"""Columns of phi, and entries of bias, of each map.  Gates in alpha have the order of `MAPS`."""
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(MAPS, size)]


def name(learned: tuple[str, ...]) -> str:
    """Return the name of the function of this file with which these maps are learned and the others frozen."""
    return "learn_" + ("_".join(learned) or "none")


def learning(learned: tuple[str, ...]) -> Callable[[OptimizerConfig], optax.GradientTransformation]:
    """Return the function that makes AdamW with updates of 0 for all maps of connections but those that are learned."""

    def frozen(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        names = [str(entry.key) for entry in path]
        if not any(part.endswith("_connection") for part in names) or names[-1] not in ("phi", "bias", "alpha"):
            return update
        for k, part in enumerate(MAPS):
            if part not in learned:
                update = update.at[..., k if names[-1] == "alpha" else COLUMNS[part]].set(0)
        return update

    def function(config: OptimizerConfig) -> optax.GradientTransformation:
        freeze = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(frozen, updates))
        return optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps), freeze)

    return function


globals().update({name(subset): learning(subset) for subset in SUBSETS})


def get_sweep() -> Sweep:
    """Return the sweep: every set of learned maps, with each of eight seeds."""
    optimizers = [f"{FILE}:{name(subset)}" for subset in SUBSETS]
    return Sweep(
        base="../configs/board.py",
        points=product(seeds(8), over("connection", ["mhc:init=home"]), over("optimizer.name", optimizers)),
        baseline={"connection": "mhc:init=home", "optimizer.name": optimizers[0]},
    )
