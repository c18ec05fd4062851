"""Write the page of a sweep, or of any folder of run folders: FOLDER/report.html, with PNG and SVG figures beside it.

    python experiments/report.py runs/connections
    python experiments/report.py runs/connections --title='Connections at 1M parameters' --output=pages/connections

Runs that differ in seeds alone are a variant.  Each variant is compared, seed by seed, with the variant that has the baseline's
connection and the same other settings.  The baseline is residual, unless the sweep names another.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.reports.page import write_folder_report

TITLE = flags.DEFINE_string("title", "", "Title of the page (default: the sweep's, else the folder's name).")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write to (default: FOLDER).")


def main(folder: str) -> int:
    """Write the page of the runs that have begun."""
    print(f"Report: {write_folder_report(Path(folder), Path(OUTPUT.value) if OUTPUT.value else None, TITLE.value)}")
    return 0


if __name__ == "__main__":
    cli.main(main, ["FOLDER"])
