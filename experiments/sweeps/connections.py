"""Compare residual, HC, mHC (`init=paper`) and mHC (`init=home`) over three seeds.

    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections
    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections-mix \\
        --config.data.source=texts/train.jsonl.zst --config.data.validation_source=texts/validation.jsonl.zst

Expect: the largest composite gain of HC is far above 1, and that of mHC near 1.  Paired differences in loss are a few hundredths
of a nat, of either sign.  With `init=paper` the streams stay nearly equal (cosine near 1), with `init=home` they differ.
Cost: 12 runs of one to two minutes on 2 cores.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the connections with the seeds."""
    # 8 blocks of width 96 have 1.0M parameters, not counting those of connections.  The runs are longer than the prototype's 200
    # steps, so that gaps have time to open.
    size = {"model.width": 96, "model.num_layers": 8, "model.mlp_width": 256, "train.steps": 400}
    return Sweep(
        base="../configs/prototype.py",
        points=product(over("connection", ["residual", "hc", "mhc:init=paper", "mhc:init=home"]), seeds(3)),
        settings=size | {"data.sequence_length": 96},
    )
