"""Train one model from a config file.

    python experiments/train.py --config=experiments/configs/demo.py:mhc --config.train.steps=400 --workdir=runs/mhc-400

The same command with the same --workdir goes on from the newest checkpoint.  Exit status: 0 finished, 2 a mistake in the
settings or a folder in use, 3 diverged, 4 another process of the run is gone, 130 stopped by Ctrl-C or SIGTERM (a checkpoint is
saved).  If JAX notices first that a process is gone, it aborts the others (134) before they can say so (`docs/run_folders.md`).

For a run of several processes, start this command once for each process, with --coordinator_address, --num_processes and
--process_id.  These flags are not needed under Slurm, Open MPI or Kubernetes, and on the hosts of a TPU slice (`docs/clusters.md`).
"""

import json
import sys

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import user_path
from mhc_jax.loop import EXIT_CODES, train
from mhc_jax.parallel import distributed

CONFIG = cli.define_config()
PROCESSES = cli.define_processes()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: its configuration, metrics and checkpoints.", required=True
)


def main() -> int:
    """Train the run, print its summary, and return the exit status."""
    folder, config = user_path(WORKDIR.value, utf8=True), CONFIG()
    PROCESSES()
    summary = train(config, folder, label=folder.name)
    if distributed.is_first_process():
        print(json.dumps(summary, indent=1), flush=True)
        if summary["status"] == "interrupted":  # once more, because the summary has pushed it out of sight
            told = f"stopped after step {summary['steps']}; saved. Run the same command to go on."
            print(f"{folder.name}: {told}", file=sys.stderr)
    return EXIT_CODES[summary["status"]]


if __name__ == "__main__":
    cli.main(main, computes=True)
