"""Compare residual, HC and mHC (`init=home`) at 110M parameters on one GPU, with two seeds each.

    python experiments/sweep.py experiments/sweeps/one_gpu.py --workdir=runs/one_gpu \\
        --config.data.source=TEXT --config.data.tokenizer=bpe:bpe16k.json

The tokenizer and the token cache are made beforehand, on any machine (`experiments/configs/one_gpu.py`).  If a job may last only
minutes, run it under `timeout --signal=INT`: the run in progress saves and stops, and the same command goes on.

Losses: not measured.  Cost: 6 runs of some minutes on an H100.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep that crosses the seeds with the connections.

    Seeds vary slowest, so that a sweep that was cut off has runs to pair.
    """
    points = product(seeds(2), over("connection", ["residual", "hc", "mhc:init=home"]))
    return Sweep(base="../configs/one_gpu.py", points=points)
