"""Measure the marginals and the composite gain of mHC (`init=home`) against t_max, the number of Sinkhorn iterations.

    python experiments/sweep.py experiments/sweeps/sinkhorn.py --workdir=runs/sinkhorn

The learning rate is 1e-2 without warm-up, so that the logits of H_res leave the region in which few iterations are enough.  Expect:
the forward gain is 1 at every t_max, because the last normalisation of Sinkhorn is that of rows.  The backward gain is above 1, and
is smaller for large t_max.  Cost: 18 runs of 10 to 90 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: residual, and mHC with every t_max, with each of three seeds."""
    t_max = product(over("connection", ["mhc:init=home"]), over("model.connection.t_max", [1, 3, 5, 20, 40]))
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual"]) + t_max, seeds(3)),
        settings={"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0},
    )
