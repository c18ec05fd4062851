"""Write the page of a sweep, or of any folder of run folders: FOLDER/report.html, and its figures as PNG and SVG files.

    python experiments/report.py runs/connections
    python experiments/report.py runs/connections --title='Connections at 1M parameters' --output=pages/connections

Runs that differ in seeds alone are a variant.  Each variant is compared, seed by seed, with its baseline: the variant with the
residual connection and otherwise the same settings.  A sweep file may name another baseline.
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.reports.page import write_folder_report

TITLE = flags.DEFINE_string("title", "", "Title of the page (default: the sweep's, else the folder's name).")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write to (default: FOLDER).")


def main(folder: str) -> int:
    """Write the page of those runs in `folder` that have begun, and print its path."""
    print(f"Report: {write_folder_report(Path(folder), Path(OUTPUT.value) if OUTPUT.value else None, TITLE.value)}")
    return 0


if __name__ == "__main__":
    cli.main(main, ["FOLDER"])
