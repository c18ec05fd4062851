"""Train all runs of the grid of a sweep file, each run in a process of its own.

    python experiments/sweep.py experiments/sweeps/connections.py --workdir=runs/connections
    python experiments/sweep.py experiments/sweeps/connections.py --list
    python experiments/sweep.py experiments/sweeps/width.py --config.data.source='texts/*.jsonl.zst' --config.train.steps=400
    python experiments/sweep.py experiments/sweeps/width.py --workdir=/shared/width --slurm_partition=gpu --slurm_gpus=1

Runs that are done are skipped, and interrupted runs go on.  `--config.a.b=value` changes the setting a.b of all runs.  If a point
of the grid sets a.b, too, the point's value holds.  The results table is WORKDIR/results.csv and results.parquet, and the page of
a finished sweep is WORKDIR/report.html.  Exit status: 0 done, 1 a run failed, 2 a mistake in the settings, 130 stopped by Ctrl-C
or SIGTERM (all runs are saved, and the same command goes on).
"""

from pathlib import Path
from typing import Any

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import require, user_path
from mhc_jax.sweeps.grid import base_configuration, load_sweep, select
from mhc_jax.sweeps.results import run_status
from mhc_jax.sweeps.runner import default_workers, run_bisection, run_local, submit

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run folders and the results (default runs/<sweep file>).")
WORKERS = flags.DEFINE_integer("workers", 0, "Runs side by side; 0: one per two cores, one alone with a GPU or TPU.")
LIST = flags.DEFINE_bool("list", False, "Print each run and its state, and stop.")
SELECT = flags.DEFINE_string(
    "select", "", "k/of: every of-th run from the k-th on, for several machines on one folder."
)
PARTITION = flags.DEFINE_string("slurm_partition", "", "Submit an array to this Slurm partition, a task for each run.")
MINUTES = flags.DEFINE_integer("slurm_minutes", 60, "Time limit of a task, in minutes.")
CPUS = flags.DEFINE_integer("slurm_cpus", 2, "Cores of a task.")
GPUS = flags.DEFINE_integer("slurm_gpus", 0, "GPUs of a task.")
MEMORY = flags.DEFINE_integer("slurm_memory_gb", 8, "Memory of a task.")
PARALLEL = flags.DEFINE_integer("slurm_parallel", 64, "Tasks that run at once.")


def main(file: str, base: dict[str, Any]) -> int:
    """List, submit or train the selected runs of the sweep file `file`, and return the exit status.

    `base` is the configuration that the points of the sweep change.
    """
    workdir = user_path(WORKDIR.value or f"runs/{Path(file).stem}", utf8=True)
    grid = load_sweep(file, base)
    selected = select(grid.runs, SELECT.value)
    if LIST.value:
        for run in selected:
            print(f"{run.name}  {run_status(workdir, run.name)}")
        return 0
    require(
        not grid.bisection or not (SELECT.value or PARTITION.value),
        f"{file} searches by bisection, which runs on one machine: leave out --select and --slurm_partition.",
    )
    if PARTITION.value:
        parameters = {
            "slurm_partition": PARTITION.value,
            "timeout_min": MINUTES.value,
            "cpus_per_task": CPUS.value,
            "gpus_per_node": GPUS.value,
            "mem_gb": MEMORY.value,
            "slurm_array_parallelism": PARALLEL.value,
        }
        jobs = submit(workdir, grid, selected, "slurm", parameters)
        print(f"Submitted {len(jobs)} tasks ({', '.join(job.job_id for job in jobs)}); results come to {workdir}.")
        return 0
    workers = WORKERS.value or default_workers()
    status = run_bisection(workdir, grid, workers) if grid.bisection else run_local(workdir, grid, selected, workers)
    print(f"Results: {workdir / 'results.csv'}")
    if status == 0:
        # SciPy and Matplotlib take a second to import, for which runs need not wait.
        from mhc_jax.reports.page import write_folder_report

        print("Drawing the report ...", flush=True)
        print(f"Report: {write_folder_report(workdir)}")
    else:
        print(f"`python experiments/report.py {workdir}` writes a page of the runs that have begun.")
    return status


if __name__ == "__main__":
    cli.main(main, ["SWEEP.py"], base_configuration)
