"""Train one model from a config file.

    python experiments/train.py --config=experiments/configs/demo.py:mhc --config.train.steps=400 --workdir=runs/mhc-400

The same command on the same --workdir goes on from the newest checkpoint.  Exit status: 0 finished, 2 a mistake in the
settings, 3 diverged, 130 stopped by Ctrl-C or SIGTERM (saved).
"""

import json
from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.loop import EXIT_CODES, train

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: config, metrics and checkpoints.", required=True)


def main() -> int:
    """Train, and print the summary."""
    folder = Path(WORKDIR.value)
    summary = train(CONFIG(), folder, label=folder.name)
    print(json.dumps(summary, indent=1))
    return EXIT_CODES[summary["status"]]


if __name__ == "__main__":
    cli.main(main)
