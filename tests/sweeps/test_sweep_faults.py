"""What a sweep says of runs that diverge, that are interrupted and that fail before they succeed."""

import types

import pytest
from support.tiny_runs import write_text
from support.tiny_sweep import base

from mhc_jax import sweep_record, sweep_runner, sweep_worker
from mhc_jax.errors import InputError
from mhc_jax.results import result_rows
from mhc_jax.run_folder import write_json
from mhc_jax.sweep import Grid, over, plan, write_plan


@pytest.fixture
def grid(tmp_path):
    write_text(tmp_path / "text.txt")
    grid = Grid("title", plan(base(tmp_path), over("connection", ["residual", "hc"])))
    write_plan(tmp_path, grid)
    return grid


def test_a_divergence_is_a_result_and_no_failure(grid, tmp_path, monkeypatch, capsys):
    def start(pool, run):
        """A process that has ended with the status of a run that diverged."""
        (tmp_path / "logs" / f"{run.name}.log").write_text("")
        pool.active[run.name] = run, types.SimpleNamespace(poll=lambda: 3)
        pool.progress.started(run.name)

    monkeypatch.setattr(sweep_runner, "POLL_S", 0)
    monkeypatch.setattr(sweep_runner._Pool, "_start", start)
    assert sweep_runner.run_local(tmp_path, grid, grid.runs, 1) == 0
    assert [row["error"] for row in result_rows(tmp_path)] == [None, None]
    assert "failed" not in capsys.readouterr().err


def test_a_success_takes_an_earlier_failure_off_the_table(grid, tmp_path, monkeypatch):
    failed = tmp_path / ".sweep" / "failed" / "hc.json"
    write_json(failed, {"exit": 1, "error": "killed"})
    assert [row["error"] for row in result_rows(tmp_path)] == [None, "killed"]
    monkeypatch.setattr(sweep_worker, "train", lambda config, folder, label: {"status": "finished"})
    assert sweep_worker.run(tmp_path, "hc") == 0
    assert [row["error"] for row in result_rows(tmp_path)] == [None, None]


@pytest.mark.parametrize("status", ["interrupted", "begun", "pending"])
def test_a_sweep_with_a_run_that_has_not_ended_is_not_recorded_as_complete(status, tmp_path, monkeypatch):
    rows = [{"run": "a", "status": "finished"}, {"run": "b", "status": status}]
    monkeypatch.setattr(sweep_record, "result_rows", lambda folder: rows)
    with pytest.raises(InputError, match=r"1 of 2 runs of .* have not ended \(b\)"):
        sweep_record.write_record(tmp_path, tmp_path / "record")
