"""HC's gain turns into NaN where the streams are fp16.

    python experiments/sweep.py experiments/sweeps/fp16.py --workdir=runs/fp16

Learning rate 1e-2, warm-up 20, clipping 1. Expect: HC diverges within 100 steps or so in every seed, residual and mHC
(`init=home`) finish; with bf16 or float32 streams the same gain stays invisible. Cost: 9 runs of 10 to 60 s on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Connection x seed with fp16 streams."""
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=home"]), seeds(3)),
        settings={"model.stream_dtype": "float16", "optimizer.learning_rate": 1e-2},
    )
