"""Show a setting in which HC has the higher loss at a small size: large embeddings, a high learning rate, no clipping.

    python experiments/sweep.py experiments/sweeps/surges.py --workdir=runs/surges

Embeddings start with a standard deviation of 1, and the learning rate is 1e-2.  Expect: without clipping, gradient norms of HC
surge by orders of magnitude after the warm-up, and its loss is the highest; mHC (`init=home`) and residual stay calm.  With
clipping at 1 the loss recovers, and the surge shows in the gradient norm alone.  Cost: 18 runs of 10 to 60 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the connections with the clipping thresholds and the seeds."""
    return Sweep(
        base="../configs/prototype.py",
        points=product(
            over("connection", ["residual", "hc", "mhc:init=home"]), over("optimizer.grad_clip", [0.0, 1.0]), seeds(3)
        ),
        settings={"model.embedding_init_std": 1.0, "optimizer.learning_rate": 1e-2},
    )
