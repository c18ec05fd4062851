"""Find the largest learning rate at which each connection trains stably, and the losses at the rates tried.

    python experiments/sweep.py experiments/sweeps/learning_rate.py --workdir=runs/learning_rate

Embeddings start with a standard deviation of 1, and gradients are not clipped: with small embeddings and clipping no run fails at
this size.  Expect: HC's gain grows with the learning rate, and at 1e-2 and above its gradient norm surges, while mHC (`init=home`)
bears the largest rates.  Cost: 54 runs of 10 to 60 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the connections with the learning rates and the seeds."""
    rates = [3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16]
    return Sweep(
        base="../configs/prototype.py",
        points=product(
            over("connection", ["residual", "hc", "mhc:init=home"]), over("optimizer.learning_rate", rates), seeds(3)
        ),
        settings={"model.embedding_init_std": 1.0, "optimizer.grad_clip": 0.0},
    )
