"""Two sweeps use one folder at the same time, and reports read it while they write."""

import csv

import pytest
from support.tiny_runs import assert_same_run, run_script, script
from support.tiny_sweep import write_sweep

PATIENCE_S = 300
RUNS = [f"{kind}-seed{seed}" for seed in (0, 1) for kind in ("residual", "mhc-num_streams-2-t_max-2")]


def statuses(workdir):
    with (workdir / "results.csv").open() as file:
        return {row["run"]: row["status"] for row in csv.DictReader(file)}


@pytest.mark.full
def test_two_sweeps_and_reports_on_one_folder(tmp_path):
    file = write_sweep(tmp_path)
    alone, workdir = tmp_path / "alone", tmp_path / "shared"
    command = ("sweep", file, "--workers=1", "--select=2/2"), ("sweep", file, "--workers=1")
    assert run_script(*command[0], f"--workdir={alone}")[0] == 0

    both = [script(*each, f"--workdir={workdir}") for each in command]
    reports = []
    while any(sweep.poll() is None for sweep in both):
        reports.append(run_script("report", workdir))
    ends = [(sweep.communicate(timeout=PATIENCE_S)[1], sweep.returncode) for sweep in both]
    assert all("Traceback" not in err for err, _ in ends), ends
    assert all(code == 0 or "float16" in err or "was left to another sweep" in err for err, code in ends), ends
    told = [err for status, _, err in reports if status]
    assert len(told) < len(reports), "no report was made while the sweeps went on"
    assert all(err.startswith("error: ") and err.count("\n") == 1 for err in told), told

    run_script(*command[1], f"--workdir={workdir}")  # goes on with what both left to each other
    assert {name: statuses(workdir)[name] for name in RUNS} == dict.fromkeys(RUNS, "finished")
    for name in RUNS[::2]:
        assert_same_run(workdir / name, alone / name)
    assert run_script("report", workdir)[0] == 0
    assert (workdir / "report.html").is_file()
