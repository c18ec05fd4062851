"""Compare residual, HC and mHC (`init=home`) at 110M parameters on one GPU, with two seeds each.

    python experiments/sweep.py experiments/sweeps/one_gpu.py --workdir=runs/one_gpu \\
        --config.data.source=TEXT --config.data.tokenizer=bpe:bpe16k.json

Make the tokenizer (`experiments/configs/one_gpu.py`) and the cache of tokenized text beforehand, on any machine.  If a job may last
only minutes, start it with `timeout --signal=INT`.  The run in progress then saves and stops, and the same command goes on.

Losses are not measured.  Cost: 6 runs of some minutes on an H100.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds


def get_sweep() -> Sweep:
    """Return the sweep: every connection with each of two seeds.

    Runs of one seed follow each other, so that a sweep that is cut off has runs with equal seeds to compare.
    """
    points = product(seeds(2), over("connection", ["residual", "hc", "mhc:init=home"]))
    return Sweep(base="../configs/one_gpu.py", points=points)
