"""Simulate schedules of pipeline parallelism, with several connections: step times, bubbles, activations, waits for messages.

    python experiments/pipeline.py --microbatches=20 --schedules=1f1b,zb1p,dualpipe --picture=timeline.png
    python experiments/pipeline.py --chip=v5p --config=experiments/configs/paper.py:27b:mhc --stages=8 --microbatches=32
    python experiments/pipeline.py --compiled=27b.json --config.model.num_layers=30 --stages=8
    python experiments/pipeline.py --report=REPORT/report.json --workload=27b --connections=residual,"mhc triton" \\
        --config.model.num_layers=32

Nothing is trained.  The times of a stage come from one of four sources:

    (no flag)   given by hand: --F, --B (both gradients) and --W of a stage, and --send of a message, in any unit
    --chip      estimated in seconds from --config, for a chip that reaches assumed shares of its peak FLOPs and bandwidth
                (`mhc_jax/planning/stage_costs.py`)
    --compiled  estimated by the compiler, in files that `experiments/compile.py --config.mesh.stage=4 --json=FILE` wrote
    --report    measured by `experiments/device_report.py` as times of train steps

`--stages` is the number of devices.  The schedules dualpipev and interleaved cut the model into twice as many stages.  The model
has config.model.num_layers blocks.  Exit status: 0, or 2 for a mistake in the settings.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import require
from mhc_jax.files.json_files import read_json
from mhc_jax.pipeline_schedules.tables import SCHEDULES
from mhc_jax.planning import pipeline_simulations
from mhc_jax.planning.stage_costs import chip_rates
from mhc_jax.plots.pipeline import timeline
from mhc_jax.plots.style import save

CONFIG = cli.define_config()
STAGES = flags.DEFINE_integer("stages", 8, "Devices along the stage axis.")
MICROBATCHES = flags.DEFINE_integer("microbatches", 32, "Microbatches of a step.")
NAMES = flags.DEFINE_list("schedules", list(SCHEDULES), "Schedules to simulate.")
CONNECTIONS = flags.DEFINE_list(
    "connections", ["residual", "mhc"], "With --chip or --report; the first is the baseline."
)
FORWARD = flags.DEFINE_float("F", 1.0, "Time of a forward, by hand.")
BACKWARD = flags.DEFINE_float("B", 2.0, "Time of a backward, both gradients, by hand.")
WEIGHTS = flags.DEFINE_float("W", 1.0, "The part of B for the gradients of weights, by hand.")
SEND = flags.DEFINE_float("send", 0.0, "Time of a message, by hand.")
PAIR = flags.DEFINE_float("pair", 1.0, "Time of an overlapped F&B over F + B, by hand or with --chip.")
CHIP = flags.DEFINE_string("chip", "", "One of slices.CHIPS: costs of --config on it.")
FLOPS_SHARE = flags.DEFINE_float("flops_share", 0.5, "With --chip: share of its peak FLOPs.")
BANDWIDTH_SHARE = flags.DEFINE_float("bandwidth_share", 0.7, "With --chip: share of its peak bandwidth.")
REPORT = flags.DEFINE_string("report", "", "report.json of experiments/device_report.py.")
WORKLOAD = flags.DEFINE_string("workload", "27b", "With --report: the model whose train steps were measured.")
COMPILED = flags.DEFINE_list("compiled", [], "JSON files of experiments/compile.py; the first row is the baseline.")
PICTURE = flags.DEFINE_string("picture", "", "File to draw to; .png and .svg are written.")


def main() -> int:
    """Simulate the schedules, print a table with a row for each simulation, and draw all of them if --picture names a file."""
    given = [flag.name for flag in (COMPILED, REPORT, CHIP) if flag.value]
    require(len(given) < 2, f"--{' and --'.join(given)} cannot be given together; choose one source of costs.")
    config = CONFIG()
    blocks = config.model.num_layers
    schedules = pipeline_simulations.schedules(NAMES.value, STAGES.value, MICROBATCHES.value)
    if REPORT.value:
        report = read_json(Path(REPORT.value))
        rows = pipeline_simulations.of_report(schedules, report, WORKLOAD.value, CONNECTIONS.value, blocks)
    elif COMPILED.value:
        advice = "give a file that experiments/compile.py --json=FILE wrote"
        files = {path: read_json(Path(path), advice) for path in COMPILED.value}
        rows = pipeline_simulations.of_compiled(schedules, files, blocks)
    elif CHIP.value:
        rates = chip_rates(CHIP.value, FLOPS_SHARE.value, BANDWIDTH_SHARE.value)
        rows = pipeline_simulations.of_model(schedules, config, CONNECTIONS.value, rates, PAIR.value)
    else:
        times = (FORWARD.value, BACKWARD.value, WEIGHTS.value)
        rows = pipeline_simulations.of_hand(schedules, *times, PAIR.value, SEND.value)
    print(pipeline_simulations.markdown(rows))
    if PICTURE.value:
        figure = timeline([row.run for row in rows], [row.title for row in rows], rows[0].unit)
        save(figure, PICTURE.value, vector=True)
    return 0


if __name__ == "__main__":
    cli.main(main)
