"""Configure the runs of the board and of most answers: width 48, 12 blocks (24 sub-layers), 600 steps of 8 sequences of 48 bytes.

    python experiments/train.py --config=experiments/configs/board.py:hc --workdir=runs/hc

The argument after the colon is a connection, as in demo.py.  The model and the optimizer are those of prototype.py, and the text
is Shakespeare's plays, which the project holds. 600 steps read 230,400 bytes and bring the residual model to 2.23 nats a byte.  A
model of the frequencies of single bytes has 3.34, and one of pairs of bytes 2.50.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

prototype = runpy.run_path(str(Path(__file__).with_name("prototype.py")))


def get_config(arg: str = "mhc") -> ConfigDict:
    """Return the configuration: that of prototype.py with more steps and validation.  `arg` is a connection."""
    config = prototype["get_config"](arg)
    config.train.steps = 600
    config.train.log_every = 10
    config.train.validate_every = 200
    config.train.validation_batches = 64
    config.train.checkpoint_every = 600
    config.train.diagnostics_every = 200
    return config
