"""Train the same decoder with several connections and write one report.  This is a sweep over connections alone.

    python experiments/compare.py --config=experiments/configs/demo.py --workdir=runs/demo
    python experiments/compare.py --connections=mhc:init=paper,mhc:init=home --seeds=3 --workdir=runs/presets

Runs with equal seeds are paired.  They share the order of the data, the tokenizer, the initial parameters of branches and the
schedule, and only the connection differs.  Runs that are done are not repeated, so the same command goes on with an interrupted
comparison.  Exit status: 0 done, 1 a run failed, 2 a mistake in the settings, 130 stopped by Ctrl-C or SIGTERM.  A terminal shows
the state of each run; elsewhere a run prints a line at its start, a line about its step every 30 s, and a line at its end.  `logs/`
in the workdir has the whole output of each run.
"""

from absl import flags

from mhc_jax import cli
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import require, user_path
from mhc_jax.sweeps.grid import Grid, over, plan, product
from mhc_jax.sweeps.runner import run_local

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
    """Train the runs that are not done, one after the other.  Then write the report, print its table and return the status."""
    require(bool(CONNECTIONS.value), "--connections is empty; name at least one, such as mhc.")
    require(SEEDS.value >= 1, f"--seeds is {SEEDS.value}; it must be at least 1.")
    config, workdir = CONFIG(), user_path(WORKDIR.value, utf8=True)
    points = over("connection", CONNECTIONS.value)
    if SEEDS.value > 1:
        first, ahead = config.train.seed, config.data.seed - config.train.seed
        seeds = range(first, first + SEEDS.value)
        points = product(points, [{"seed": seed, **({"data.seed": seed + ahead} if ahead else {})} for seed in seeds])
    title = TITLE.value or f"{', '.join(CONNECTIONS.value)} side by side"
    grid = Grid(title, plan(to_mapping(config), points))
    status = run_local(workdir, grid, grid.runs, workers=1)
    if status == 0:
        # SciPy and Matplotlib take a second to import, for which the first train step need not wait.
        from mhc_jax.analysis.comparison import rows
        from mhc_jax.analysis.run_reader import read_run
        from mhc_jax.reports.markup import markdown_table
        from mhc_jax.reports.page import write_report

        records = [read_run(workdir / run.name) for run in grid.runs]
        print("Drawing the report ...", flush=True)
        report = write_report(records, workdir, title)
        print(f"\n{markdown_table(rows(records))}\n\nReport: {report}")
    return status


if __name__ == "__main__":
    cli.main(main)
