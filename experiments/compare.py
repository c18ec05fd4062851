"""Train the same decoder with several connections, side by side, and write one report.

    python experiments/compare.py --config=experiments/configs/demo.py --workdir=runs/demo
    python experiments/compare.py --connections=mhc:init=paper,mhc:init=home --seeds=3 --workdir=runs/presets

The runs are paired: they share data order, tokenizer, branch initialisation and schedule; only the connection differs.
Runs that are done are not repeated, so an interrupted comparison goes on with the same command.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import require
from mhc_jax.sweeps.paired import plan, run_all

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list(
    "connections", ["residual", "hc", "mhc:init=paper", "mhc:init=home"], "Kinds, with settings as kind:key=value."
)
SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Runs of each connection: train.seed and data.seed count up from the config's."
)
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run folders and of report.html.")
TITLE = flags.DEFINE_string("title", "", "Title of the report (default: the connections).")


def main() -> int:
    """Run what is missing, then report."""
    require(SEEDS.value >= 1, f"--seeds is {SEEDS.value}; it must be at least 1.")
    runs = plan(CONFIG(), CONNECTIONS.value, SEEDS.value)
    title = TITLE.value or f"{', '.join(CONNECTIONS.value)} side by side"
    return run_all(runs, Path(WORKDIR.value), title)


if __name__ == "__main__":
    cli.main(main)
