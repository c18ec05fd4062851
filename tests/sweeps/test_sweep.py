"""A sweep: done runs are not repeated, failed, killed and stopped ones go on, and the table tells; workers run in this process.

Only the tests marked `full` start real ones.
"""

import csv
import fcntl
import os
import shlex
import signal
import sys
from pathlib import Path

import jax
import pyarrow.parquet
import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT, assert_same_run, at_step, data_of, lines, run_script, tiny, with_train, write_text
from support.tiny_sweep import base, write_sweep
from support.workers_here import Clock, Worker, workers_here

from mhc_jax import sweep_runner, sweep_worker
from mhc_jax.data import resolve_vocabulary
from mhc_jax.errors import InputError
from mhc_jax.mapping import to_mapping
from mhc_jax.run_folder import read_json, write_json
from mhc_jax.sweep import Busy, Grid, over, plan, run_lock, seeds, write_plan
from mhc_jax.train_step import init_state, make_eval_step, make_train_step

FAILS = "residual-compute_dtypefloat16"
RUNS = ["residual-seed0", "mhc-num_streams-2-seed0", "residual-seed1", "mhc-num_streams-2-seed1"]
TIMES = ("step_time_s", "date", "commit")


def table(workdir: Path) -> dict[str, dict]:
    """results.csv by run, without what differs between two calls."""
    with (workdir / "results.csv").open() as file:
        return {row["run"]: {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)}


@pytest.fixture(scope="module", autouse=True)
def _workers():
    with workers_here():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(file):
    """The whole sweep, uninterrupted: (folder, exit status, standard error)."""
    workdir = file.parent / "done"
    status, _, err = run_here("sweep", file, f"--workdir={workdir}", "--workers=1")
    return workdir, status, err


def test_a_sweep_runs_all_its_points_and_names_the_one_that_fails(done):
    workdir, status, err = done
    assert status == 1, err
    assert f"{FAILS} failed (exit status 2: error: model.compute_dtype is 'float16'" in err
    assert "(4 of 5 runs done)" in err
    rows = table(workdir)
    assert list(rows) == [FAILS, *RUNS]
    assert [row["status"] for row in rows.values()] == ["failed"] + 4 * ["finished"]
    assert "does not run on a CPU" in rows[FAILS]["error"]
    assert {rows[run]["seed"] for run in RUNS} == {"0", "1"}
    row = rows[RUNS[3]]
    summary = read_json(workdir / RUNS[3] / "summary.json")
    assert (row["connection"], row["kind"]) == ("mhc:num_streams=2:init=paper", "mhc")
    assert (row["seed"], row["data_seed"], row["model.connection.num_streams"]) == ("1", "1", "2")
    typed = [
        "python",
        ROOT / "experiments" / "sweep.py",
        workdir.parent / "tiny.py",
        f"--workdir={workdir}",
        "--workers=1",
    ]
    assert read_json(workdir / RUNS[3] / "env.json")["command"] == shlex.join(map(str, typed))
    assert float(row["validation_loss"]) == summary["validation_loss"]
    assert int(row["parameters"]) == summary["parameters"]
    assert row["device"].startswith("cpu")
    trained = [line for line in lines(workdir / "residual-seed0", "train") if line["step"] > 2]
    assert float(rows["residual-seed0"]["max_grad_norm"]) == max(line["grad_norm"] for line in trained)
    parquet = pyarrow.parquet.read_table(workdir / "results.parquet").to_pylist()
    assert [r["validation_loss"] for r in parquet[1:]] == [float(rows[run]["validation_loss"]) for run in RUNS]


def test_seeds_share_their_programs(tmp_path):
    """Of the first and of the second seed the training and the validation step are one program each."""
    config = tiny(write_text(tmp_path / "text.txt"), "residual")
    config = resolve_vocabulary(config, data_of(config))
    shape = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length), "int32")
    tokens, found = {"inputs": shape, "targets": shape}, set()
    for run in plan(to_mapping(config), seeds(2)):
        state = jax.eval_shape(lambda run=run: init_state(run.config))
        train, validate = jax.jit(make_train_step(run.config)), jax.jit(make_eval_step(run.config))
        found.add((train.lower(state, tokens).as_text(), validate.lower(state.params, tokens).as_text()))
    assert len(found) == 1


def test_a_second_call_repeats_nothing_but_the_failure(file, done):
    before = {run: (done[0] / run / "metrics.jsonl").stat().st_mtime_ns for run in RUNS}
    status, _, err = run_here("sweep", file, f"--workdir={done[0]}", "--workers=2")
    assert status == 1
    assert "4 of 5 runs are done already" in err
    assert [name for name in (FAILS, *RUNS) if f"{name}: started" in err] == [FAILS]
    assert before == {run: (done[0] / run / "metrics.jsonl").stat().st_mtime_ns for run in RUNS}
    status, out, _ = run_here("sweep", file, f"--workdir={done[0]}", "--list")
    assert status == 0
    assert out.splitlines() == [f"{FAILS}  failed", *[f"{run}  finished" for run in RUNS]]


def test_killed_and_stopped_at_will_the_table_is_the_same(file, done):
    """Kill -9 of a worker, a signal to a worker, a signal to the sweep; then a call that is left alone."""
    workdir = file.parent / "killed"
    command = ("sweep", file, f"--workdir={workdir}", "--workers=1", "--select=2/2")
    first, second = RUNS[0], RUNS[2]
    Worker.at = {first: (5, signal.SIGKILL), second: (4, signal.SIGTERM)}
    status, _, err = run_here(*command)
    assert status == 1
    assert f"{first} failed (killed by SIGKILL, perhaps for want of memory)" in err
    assert read_json(workdir / ".sweep" / "failed" / f"{first}.json")["error"].startswith("killed by SIGKILL")
    assert table(workdir)[first]["status"] == "failed"
    assert f"{second} failed (stopped by a signal from elsewhere; saved: " in err
    assert read_json(workdir / second / "summary.json")["status"] == "interrupted"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "asleep", {first})
        patch.setattr(sweep_runner, "time", Clock({1.0: lambda: signal.raise_signal(signal.SIGINT)}))
        status, _, err = run_here(*command)
    assert status == 130, err
    assert "Run the same command to go on" in err
    assert f"{first}: started" in err
    assert f"{second}: started" not in err

    status, _, err = run_here(*command)
    assert (status, Worker.at) == (0, {}), err
    assert not list((workdir / ".sweep" / "failed").iterdir())
    check_gone_on(workdir, done[0])


def check_gone_on(workdir, done):
    """The runs of the first sweep are those of the second, which was left alone; the others have not begun."""
    assert (table(workdir)[FAILS]["status"], table(workdir)[RUNS[1]]["status"]) == ("pending", "pending")
    for run in RUNS[::2]:
        events = [line["event"] for line in lines(workdir / run, "event") if line["event"] == "resumed"]
        assert 1 <= len(events) <= 3
        assert_same_run(workdir / run, done / run)
        assert table(workdir)[run] == table(done)[run]


@pytest.mark.full
def test_real_workers_are_killed_and_stopped_and_the_table_is_the_same(tmp_path, monkeypatch):
    """As above, with processes; and a sweep that is killed, whose worker saves and ends. Seeds compile once."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # so that programs are kept where the sweep says
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    file, first, second = write_sweep(tmp_path), RUNS[0], RUNS[2]
    status, _, err = run_script("sweep", file, f"--workdir={tmp_path / 'done'}", "--workers=1")
    assert (status, "(4 of 5 runs done)" in err) == (1, True), err
    # Training and validation step of two connections; a miss at the second seed would make eight.
    assert len(list((tmp_path / "done" / ".sweep" / "xla").glob("jit_step-*-cache"))) == 4

    workdir = tmp_path / "killed"
    command = ("sweep", file, f"--workdir={workdir}", "--workers=1", "--select=2/2")
    at = {first: (5, signal.SIGKILL, "self"), second: (2, signal.SIGKILL, "parent")}
    status, _, _ = run_script(*command, env=at_step(at))
    assert status == -signal.SIGKILL
    assert "killed by SIGKILL" in read_json(workdir / ".sweep" / "failed" / f"{first}.json")["error"]
    with run_lock_waited(workdir, second):  # its worker outlived the sweep, and has saved
        assert read_json(workdir / second / "summary.json")["status"] == "interrupted"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; a preexec_fn would fork, which JAX warns of
    try:
        status, _, err = run_script(*command, env=at_step({first: (6, signal.SIGINT, "parent")}))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130, err
    assert "Run the same command to go on" in err
    with run_lock(workdir, first):  # its worker has gone
        pass

    status, _, err = run_script(*command)
    assert status == 0, err
    check_gone_on(workdir, tmp_path / "done")


def run_lock_waited(workdir, name):
    """The lock of a run, waited for."""
    file = (workdir / ".sweep" / "locks" / name).open()
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_worker_whose_sweep_has_gone_asks_itself_to_stop(monkeypatch):
    parents, sent, clock = iter([7, 7, 1]), [], Clock()
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *what: sent.append((clock.now, *what)))
    monkeypatch.setattr(sweep_worker, "time", clock)
    sweep_worker.watch(7)
    assert sent == [(2 * 0.5, os.getpid(), signal.SIGTERM)]


def test_a_divergence_is_a_result_and_no_failure(tmp_path):
    config = with_train(tiny(write_text(tmp_path / "text.txt"), "residual"), divergence_loss=1.0)
    runs = plan(to_mapping(config), [{}])
    assert sweep_runner.run_local(tmp_path / "w", Grid("title", runs), runs, 1) == 0
    assert table(tmp_path / "w")["base"]["status"] == "diverged"


def test_a_run_that_another_process_has_is_left_alone(tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "text.txt")
    runs = plan(base(tmp_path), over("connection", ["residual"]))
    grid = Grid("title", runs)
    write_plan(tmp_path / "w", grid)
    clock = Clock()
    monkeypatch.setattr(sweep_runner, "time", clock)
    with run_lock(tmp_path / "w", "residual"):
        with pytest.raises(Busy, match=f"process {os.getpid()} on "), run_lock(tmp_path / "w", "residual"):
            pass
        assert sweep_runner.run_local(tmp_path / "w", grid, runs, 1) == 1
    assert clock.now > sweep_runner.PATIENCE_S
    assert f"residual was left to another sweep (process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "w" / "residual").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    write_plan(tmp_path, Grid("title", plan(base(tmp_path), [{}])))
    lock = tmp_path / ".sweep" / "locks" / "base"
    lock.write_text("process 999999999 on elsewhere\n")
    with run_lock(tmp_path, "base"):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


# Submitit's debug job leaves its logs open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_slurm_task_is_the_same_run(tmp_path):
    pytest.importorskip("submitit")
    write_text(tmp_path / "text.txt")
    runs = plan(base(tmp_path), over("connection", ["residual"]))
    grid = Grid("title", runs)
    jobs = sweep_runner.submit(tmp_path / "w", grid, runs, "debug", {"timeout_min": 1, "slurm_partition": "p"})
    assert [job.result() for job in jobs] == [0]
    assert table(tmp_path / "w")["residual"]["status"] == "finished"
    with pytest.raises(InputError, match="submitit refuses cluster"):
        sweep_runner.submit(tmp_path / "w", grid, runs, "nowhere", {})


def test_without_submitit_a_slurm_array_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'mhc-jax\[slurm\]'"):
        sweep_runner.submit(tmp_path, Grid("title", []), [], "slurm", {})


def test_a_run_that_was_begun_with_another_text_stops_the_sweep_before_its_first_start(tmp_path):
    write_text(tmp_path / "text.txt")
    runs = plan(base(tmp_path), over("connection", ["residual", "hc"]))
    begun = tmp_path / "w" / "residual"
    begun.mkdir(parents=True)
    write_json(begun / "config.json", to_mapping(runs[0].config))
    write_json(begun / "env.json", {"data": {"train_sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"The training text is not the one that .*residual was trained with"):
        sweep_runner.prepare(tmp_path / "w", Grid("title", runs), runs[1:])
    assert not (tmp_path / "w" / "sweep.json").exists()
