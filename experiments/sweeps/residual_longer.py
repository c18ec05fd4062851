"""For equal wall clock: what the residual model reaches with more steps, in the time that other connections take.

    python experiments/sweep.py experiments/sweeps/residual_longer.py --workdir=runs/residual_longer --workers=2

Settings. residual at configs/board.py with 600 to 1,800 steps, each with its own cosine to 10 %, and the seeds 0 to 9 of
which_map.py and mixing_needed.py.

Rule, secondary in both questions.  A step of a connection takes r times as long as one of residual, by the medians of
`experiments/steptime.py`, which runs both in turns.  At equal time its loss is compared, seed by seed, with that of residual
after 600 r steps.  That loss is interpolated between the two nearest numbers of steps, linearly in their logarithm.

Cost: 60 runs of 15 to 40 s on 2 CPU cores, a quarter of an hour in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: six numbers of steps with each of ten seeds."""
    return Sweep(
        base="../configs/board.py:residual",
        points=product(seeds(10), over("train.steps", [600, 750, 900, 1200, 1500, 1800])),
    )
