"""Find the largest learning rate at which each connection trains stably, and its losses at lower and higher rates.

    python experiments/sweep.py experiments/sweeps/learning_rate.py --workdir=runs/learning_rate

Embeddings start with a standard deviation of 1, and gradients are not clipped, because with small embeddings and clipping no run
fails at this size.  Expect: HC's gain grows with the learning rate, and at 8e-2 and above its gradient norm surges.  mHC
(`init=home`) is stable at four times the largest stable rate of HC.  Cost: 54 runs of 10 to 60 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection with every learning rate and each of three seeds."""
    rates = [3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16]
    return Sweep(
        base="../configs/prototype.py",
        points=product(
            over("connection", ["residual", "hc", "mhc:init=home"]), over("optimizer.learning_rate", rates), seeds(3)
        ),
        settings={"model.embedding_init_std": 1.0, "optimizer.grad_clip": 0.0},
    )
