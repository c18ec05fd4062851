"""Draw one figure of runs for a paper, as PDF, SVG and PNG, and write its caption beside it.

    python experiments/figure.py --list
    python experiments/figure.py gain_depth runs/demo --size=column --output=figures/gain.pdf
    python experiments/figure.py gain_depth runs/demo --panel='composite backward close-up' --size=3.3 --font=8

RUNS are folders of sweeps, folders of run folders, single run folders, or records of sweeps; one figure shows all their runs.
Runs that differ in seeds alone are averaged where the figure shows curves of variants; --each_run shows each of them.  A panel is
chosen by its number or by words of its title, and several by their numbers, as --panel=3,4.  The caption (.txt) says which runs
the figure shows and what its lines and bands are.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli, plots
from mhc_jax.errors import require, user_path
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.reports.figures import NAMED, draw_figure, size_of, write_figure

SIZE = flags.DEFINE_string("size", "column", f"{', '.join(plots.SIZES)}, or a width in inches.")
FONT = flags.DEFINE_float("font", 0.0, "Size of the text in points (0: 7 in a column, 8 on a page, 9 on a screen).")
PANEL = flags.DEFINE_string("panel", "", "Panels to draw: numbers joined with commas, or words of the title of one.")
OUTPUT = flags.DEFINE_list(
    "output", [], "Files ending in .pdf, .svg or .png; without an ending all three (default: NAME)."
)
EACH_RUN = flags.DEFINE_bool("each_run", False, "Show each seed by itself, without means over seeds.")
LIST = flags.DEFINE_bool("list", False, "Print the names of the figures.")
PAGE_HEIGHT = 9.0
"""Height in inches that fits a page of a paper."""


def main(arguments: list[str]) -> int:
    """Draw the figure `arguments[0]` of the runs in the folders `arguments[1:]`, and print the files and the caption."""
    if LIST.value:
        for name, plot in NAMED.items():
            of = "seeds and sweeps" if name in SWEEP_FIGURES else "runs"
            print(f"{name:18} {plot.title} ({of})")
        return 0
    require(bool(arguments), "NAME is missing; the command is figure.py NAME RUNS, and --list shows the names.")
    name, *folders = arguments
    size = size_of(SIZE.value, FONT.value, PANEL.value)
    drawn = draw_figure(name, [user_path(folder) for folder in folders], size, EACH_RUN.value)
    files = write_figure(drawn, [user_path(path) for path in OUTPUT.value] or [Path(name)])
    width, height = drawn.figure.get_size_inches()
    print(f"Figure: {', '.join(map(str, files))} ({width:.1f} x {height:.1f} inches)")
    if len(drawn.panels) > 1 and not PANEL.value:
        print("\n".join(f"--panel={k}: {panel}" for k, panel in enumerate(drawn.panels, 1)))
    if height > PAGE_HEIGHT:
        print(f"It is higher than a page ({PAGE_HEIGHT:g} inches); choose a panel, or --size=page.")
    print(f"\n{drawn.caption}")
    return 0


if __name__ == "__main__":
    cli.main(main, None)
