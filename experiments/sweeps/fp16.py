"""Show that HC's gain leads to NaN when the streams are float16.

    python experiments/sweep.py experiments/sweeps/fp16.py --workdir=runs/fp16

The learning rate is 1e-2, the warm-up has 20 steps, and gradients are clipped at a norm of 1.  Expect: HC diverges with two of the
three seeds (experiments/LOG.md), while residual and mHC (`init=home`) finish.  With bfloat16 or float32 streams HC's gain does no
visible harm.  Cost: 9 runs of 10 to 60 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection with float16 streams and each of three seeds."""
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=home"]), seeds(3)),
        settings={"model.stream_dtype": "float16", "optimizer.learning_rate": 1e-2},
    )
