"""Look for surges of HC's gradient norm at a small size: large embeddings, a high learning rate, no clipping.

    python experiments/sweep.py experiments/sweeps/surges.py --workdir=runs/surges

Embeddings start with a standard deviation of 1, and the learning rate is 1e-2.  Expect no surge: HC's largest gain exceeds 1e4, but
its loss is about that of residual, with and without clipping (experiments/LOG.md).  In an earlier prototype, with another text, the
gradient norm of HC alone surged by orders of magnitude.  Cost: 18 runs of 10 to 60 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection without clipping and with clipping at a gradient norm of 1, with each of three seeds."""
    return Sweep(
        base="../configs/prototype.py",
        points=product(
            over("connection", ["residual", "hc", "mhc:init=home"]), over("optimizer.grad_clip", [0.0, 1.0]), seeds(3)
        ),
        settings={"model.embedding_init_std": 1.0, "optimizer.learning_rate": 1e-2},
    )
