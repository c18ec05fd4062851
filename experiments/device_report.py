"""Check and time the connections on this device: correctness of kernels, their times, train-step times, repeatability.

    python experiments/device_report.py [--workdir=experiments/records/<date>-device-<name>] [--budget=480] [--tiny]

The report has several parts.  The command measures them in order of importance and writes report.json and README.md after each.
It stops when the budget (seconds) is spent.  The same command with the same --workdir then measures the missing parts.  It needs
no data and no network.  `--tiny` chooses small shapes, with which a CPU can try the command; their times mean nothing.
"""

import argparse
import datetime
import json
import re
import time
from pathlib import Path

from mhc_jax.runs.environment import environment
from mhc_jax.timing.device_report import plan, readme, run, write

NEEDS = 30
"""Number of seconds of the budget that must be left when a part of the report begins."""


def main() -> int:
    """Measure the missing parts of the report and write it.  Return 1 if an implementation gives wrong results, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--budget", type=float, default=480.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    env = environment()
    name = re.sub(r"\W+", "-", env["device"].lower()).strip("-")
    folder = args.workdir or Path(__file__).parent / "records" / f"{datetime.date.today()}-device-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    report = {"env": env, "tiny": args.tiny, "parts": {}, "left": []}
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text())
        same = report["tiny"] == args.tiny and all(report["env"][k] == env[k] for k in ("device", "commit", "packages"))
        if not same:
            parser.error(f"{folder} holds the report of another device, commit or size; choose another --workdir.")

    report["left"] = [key for key in plan(args.tiny) if key not in report["parts"]]
    while report["left"] and time.monotonic() - began < args.budget - NEEDS:
        key, start = report["left"].pop(0), time.monotonic()
        report["parts"][key] = run(key, args.rounds, report)
        write(folder, report)
        print(f"{time.monotonic() - began:5.0f} s  {key} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"\n{readme(report)}\n{folder}")
    rows = [row for key, value in report["parts"].items() if key.startswith(("correct/", "bench/")) for row in value]
    return 1 if any(row["status"] == "FAILED" for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
