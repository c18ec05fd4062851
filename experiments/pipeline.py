"""What a schedule of pipeline parallelism costs: bubbles, activations, messages that show, and mHC over residual.

    python experiments/pipeline.py --microbatches=20 --schedules=1f1b,zb1p,dualpipe --picture=timeline.png
    python experiments/pipeline.py --chip=v5p --config=experiments/configs/paper.py:27b:mhc --stages=8 --microbatches=32
    python experiments/pipeline.py --compiled=27b.json --blocks=30 --stages=8
    python experiments/pipeline.py --report=REPORT/report.json --workload=27b --connections=residual,"mhc triton" --blocks=32

Without --chip, --compiled or --report a stage takes --F, --B (both gradients) and --W, and --send a message.  With --chip, seconds
from `mhc_jax/planning/pipeline_costs.py` for --config: bytes and FLOPs at shares of the chip's peaks, which are assumptions.  With
--compiled, those that the compiler estimates, in files of `experiments/compile.py --mesh=stage=4 --json=FILE`.  `--stages` are
devices; dualpipev and interleaved cut the model into twice as many.  Nothing is trained.  Exit status: 0, or 2 for a mistake in
the settings.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.planning import pipeline_tables
from mhc_jax.planning.pipeline_costs import chip_rates
from mhc_jax.plots.pipeline import timeline
from mhc_jax.plots.style import save
from mhc_jax.runs.folder import read_json
from mhc_jax.schedules.tables import SCHEDULES

CONFIG = cli.define_config()
STAGES = flags.DEFINE_integer("stages", 8, "Devices along the stage axis.")
MICROBATCHES = flags.DEFINE_integer("microbatches", 32, "Of a step.")
NAMES = flags.DEFINE_list("schedules", list(SCHEDULES), "Which.")
CONNECTIONS = flags.DEFINE_list(
    "connections", ["residual", "mhc"], "With --chip or --report; the first is the baseline."
)
UNITS = [
    flags.DEFINE_float(name, value, "By hand.") for name, value in (("F", 1.0), ("B", 2.0), ("W", 1.0), ("send", 0.0))
]
PAIR = flags.DEFINE_float("pair", 1.0, "F&B over F + B.")
CHIP = flags.DEFINE_string("chip", "", "One of topology.CHIPS: costs of --config on it.")
SHARES = [flags.DEFINE_float(f"{name}_share", v, "Of the peak.") for name, v in (("flops", 0.5), ("bandwidth", 0.7))]
REPORT = flags.DEFINE_string("report", "", "report.json of experiments/device_report.py.")
WORKLOAD = flags.DEFINE_string("workload", "27b", "With --report: whose train steps.")
BLOCKS = flags.DEFINE_integer("blocks", 32, "With --compiled or --report: of the model.")
COMPILED = flags.DEFINE_list("compiled", [], "JSON files of experiments/compile.py; the first row is the baseline.")
PICTURE = flags.DEFINE_string("picture", "", "File to draw to; .png and .svg are written.")


def main() -> int:
    """Simulate, print, draw."""
    where = (NAMES.value, STAGES.value, MICROBATCHES.value)
    if REPORT.value:
        report = read_json(Path(REPORT.value))
        rows = pipeline_tables.of_report(*where, report, WORKLOAD.value, CONNECTIONS.value, BLOCKS.value)
    elif COMPILED.value:
        rows = pipeline_tables.of_compiled(*where, [read_json(Path(path)) for path in COMPILED.value], BLOCKS.value)
    elif CHIP.value:
        rates = chip_rates(CHIP.value, *(flag.value for flag in SHARES))
        rows = pipeline_tables.of_model(*where, CONFIG(), CONNECTIONS.value, rates, PAIR.value)
    else:
        F, B, W, send = (flag.value for flag in UNITS)
        rows = pipeline_tables.of_hand(*where, F, B, W, PAIR.value, send)
    print(pipeline_tables.markdown(rows))
    if PICTURE.value:
        figure = timeline([row.run for row in rows], [row.title for row in rows], rows[0].unit)
        save(figure, PICTURE.value, vector=True)
    return 0


if __name__ == "__main__":
    cli.main(main)
