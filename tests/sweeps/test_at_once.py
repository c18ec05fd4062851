"""Two sweeps use one folder at the same time, and reports read it while they write."""

import csv
import time

import pytest
from support.tiny_runs import PATIENCE_S, assert_same_run, run_script, script
from support.tiny_sweep import write_sweep

RUNS = ["residual-seed0", "residual-seed1"]


@pytest.mark.full
def test_two_sweeps_and_reports_on_one_folder(tmp_path):
    command = ("sweep", write_sweep(tmp_path), "--workers=1", "--select=2/2")
    alone, workdir = tmp_path / "alone", tmp_path / "shared"
    assert run_script(*command, f"--workdir={alone}")[0] == 0

    both = [script(*command, f"--workdir={workdir}") for _ in range(2)]
    reports, end = [], time.monotonic() + PATIENCE_S
    try:
        while any(sweep.poll() is None for sweep in both) and time.monotonic() < end:
            reports.append(run_script("report", workdir))
        ends = [(sweep.communicate(timeout=10)[1], sweep.returncode) for sweep in both]
    finally:
        for sweep in both:
            sweep.kill()
    assert all(code == 0 or "was left to another sweep" in err for err, code in ends), ends
    told = [err for status, _, err in reports if status]
    assert len(told) < len(reports), "no report was made while the sweeps went on"
    assert all(err.startswith("error: ") and err.count("\n") == 1 for err in told), told

    assert run_script(*command, f"--workdir={workdir}")[0] == 0  # goes on with what both left to each other
    with (workdir / "results.csv").open() as file:
        states = {row["run"]: row["status"] for row in csv.DictReader(file)}
    assert {name: states[name] for name in RUNS} == dict.fromkeys(RUNS, "finished")
    for name in RUNS:
        assert_same_run(workdir / name, alone / name)
    assert run_script("report", workdir)[0] == 0
    assert (workdir / "report.html").is_file()
