"""Write the record of a sweep to experiments/records/<date>-sweep-NAME, without checkpoints, locks and absolute paths.

    python experiments/record.py runs/width width
    python experiments/record.py runs/connections connections --metrics --note='Nothing else ran on the machine.'

NAME is the name of the sweep's file in experiments/sweeps, without .py.  The date is the day on which the last run began (UTC).
"""

from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import require
from mhc_jax.reports.record import write_record
from mhc_jax.sweeps.results import result_rows

METRICS = flags.DEFINE_bool("metrics", False, "Keep metrics.jsonl of every run, too.")
UNFINISHED = flags.DEFINE_bool("unfinished", False, "Record a sweep although some of its runs have not ended.")
NOTE = flags.DEFINE_string("note", "", "A sentence for README.md, such as what else ran on the machine.")
RECORDS = flags.DEFINE_string("records", "", "Folder of the record (default experiments/records).")
HERE = Path(__file__).resolve().parent


def main(folder: str, name: str) -> int:
    """Write the record of the sweep `name`, whose runs are in `folder`, and print where it is."""
    dates = [row["date"] for row in result_rows(Path(folder)) if row["date"]]
    require(bool(dates), f"No run of {folder} has begun; there is nothing to record.")
    place = Path(RECORDS.value or HERE / "records") / f"{max(dates)[:10]}-sweep-{name}"
    print(f"Record: {write_record(Path(folder), place, METRICS.value, UNFINISHED.value, NOTE.value)}")
    return 0


if __name__ == "__main__":
    cli.main(main, ["SWEEPDIR", "NAME"])
