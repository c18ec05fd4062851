"""Compare residual, HC, mHC (`init=paper`) and mHC (`init=home`) over three seeds.

    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections
    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections-mix \\
        --config.data.source=texts/train.jsonl.zst --config.data.validation_source=texts/validation.jsonl.zst

Expect: the largest composite gain of HC is far above 1, and that of mHC is near 1.  With equal seeds the losses of two connections
differ by a few hundredths of a nat per token, in either direction.  With `init=paper` the streams stay nearly equal (cosine near
1), and with `init=home` they differ.  Cost: 12 runs of one to two minutes on 2 CPU cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection with each of three seeds."""
    # 8 blocks of width 96 have 1.0M parameters, not counting those of connections.  Runs have 400 steps instead of the 200 of
    # prototype.py, so that differences in loss have time to grow.
    size = {"model.width": 96, "model.num_layers": 8, "model.mlp_width": 256, "train.steps": 400}
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=paper", "mhc:init=home"]), seeds(3)),
        settings=size | {"data.sequence_length": 96},
    )
