"""Check that runs whose streams overflow count as diverged: 40 runs of HC, 6 of residual and 6 of mHC.

    python experiments/sweep.py experiments/sweeps/overflow.py --workdir=runs/overflow

A model of width 16 is trained for 120 steps at learning rates from 1e-3 to 1, with streams in float32, bfloat16 and float16.
Expect: HC with 32 or 64 sub-layers diverges at learning rates of 0.1 and 1, and in float16 at 0.01, too.  HC with 8 sub-layers
diverges at a learning rate of 1, and in float16 at 0.1, too.  Residual and mHC diverge only in float16 at a learning rate of 1.
No run that finishes has a gradient norm of zero.
Cost: 52 runs of 10 to 60 s on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Point, Sweep, over, product

KEYS = ("connection", "model.num_layers", "optimizer.grad_clip", "optimizer.schedule")


def points(*rows: tuple) -> list[Point]:
    """Make a point from each row.  A row holds the values of the settings `KEYS`, in this order."""
    return [dict(zip(KEYS, row, strict=True)) for row in rows]


def get_sweep() -> Sweep:
    """Return the sweep: rows of values of `KEYS`, combined with dtypes of the streams and with learning rates."""
    hard = (32, 0.0, "constant")
    hc = points(("hc", 32, 1.0, "cosine"), ("hc:tanh=False", *hard), ("hc:tanh=False", 4, 0.0, "cosine"))
    others = points(("residual", *hard), ("mhc:init=paper", *hard))
    clipped = points(("hc:tanh=False", 16, 1.0, "constant"))
    rates, high = (over("optimizer.learning_rate", values) for values in ([1e-3, 1e-2, 0.1, 1.0], [0.1, 1.0]))
    dtypes = over("model.stream_dtype", ["float32", "bfloat16", "float16"])
    size = {"model.width": 16, "model.mlp_width": 16, "model.num_heads": 2, "model.num_kv_heads": 1}
    short = {"data.sequence_length": 16, "data.batch_size": 2, "optimizer.warmup_steps": 2, "train.steps": 120}
    every = {"train.validate_every": 120, "train.validation_batches": 4, "train.diagnostics_every": 20}
    return Sweep(
        base="../configs/prototype.py",
        points=[
            *product(others, dtypes, high),
            *product(hc, dtypes, rates),
            *product(clipped, dtypes[:1], rates),
        ],
        settings=size | short | every | {"train.checkpoint_every": 120},
    )
