"""One process of a run of several: experiments/train.py, which at a step sends itself a signal.

    python tests/support/one_process.py STEP SIGNAL --config=... ...

The signal comes while the metrics of STEP are read; STEP 0: never.
"""

import os
import runpy
import sys
from pathlib import Path

from mhc_jax import loop

step, number = int(sys.argv[1]), int(sys.argv[2])
read = loop._Run._read


def reading(self, at, metrics):
    if at == step:
        os.kill(os.getpid(), number)
    return read(self, at, metrics)


setattr(loop._Run, "_read", reading)
script = Path(__file__).parents[2] / "experiments" / "train.py"
sys.argv = [str(script), *sys.argv[3:]]
runpy.run_path(str(script), run_name="__main__")
