"""A sweep repeats no run that is done, goes on with failed, killed and stopped ones, and writes its table and record.

Workers run in this process; only the tests marked `full` start real ones.
"""

import csv
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pyarrow.parquet
import pytest
from support import meshes
from support.in_process import run_here
from support.tiny_runs import ROOT, assert_same_run, at_step, lines, run_script, write_text
from support.tiny_sweep import base, write_sweep
from support.workers_here import Clock, Worker, workers_here

from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.runs.lock import Busy, holder, run_lock
from mhc_jax.sweeps import runner, worker
from mhc_jax.sweeps.grid import Grid, applied, over, plan, seeds, write_plan
from mhc_jax.sweeps.results import result_rows
from mhc_jax.train_step import init_state, make_eval_step, make_train_step

FAILS = "residual-compute_dtypefloat16"
RUNS = ["residual-seed0", "mhc-num_streams-2-t_max-2-seed0", "residual-seed1", "mhc-num_streams-2-t_max-2-seed1"]
TIMES = ("step_time_s", "date", "commit")


def table(workdir: Path) -> dict[str, dict]:
    """Rows of results.csv by run, without the columns that differ between two calls."""
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
    """Folder, exit status and standard error of the whole sweep, which nothing interrupted."""
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
    row, summary = rows[RUNS[3]], read_json(workdir / RUNS[3] / "summary.json")
    assert (row["connection"], row["kind"]) == ("mhc:num_streams=2:init=paper:t_max=2", "mhc")
    assert (row["seed"], row["data_seed"], row["model.connection.num_streams"]) == ("1", "1", "2")
    typed = [
        "python",
        f"{ROOT}/experiments/sweep.py",
        f"{workdir.parent}/tiny.py",
        f"--workdir={workdir}",
        "--workers=1",
    ]
    assert read_json(workdir / RUNS[3] / "env.json")["command"] == shlex.join(typed)
    assert float(row["validation_loss"]) == summary["validation_loss"]
    assert int(row["parameters"]) == summary["parameters"]
    assert row["device"].startswith("cpu")
    norms = [line["grad_norm"] for line in lines(workdir / "residual-seed0", "train") if line["step"] > 2]
    assert float(rows["residual-seed0"]["max_grad_norm"]) == max(norms)
    parquet = pyarrow.parquet.read_table(workdir / "results.parquet").to_pylist()
    assert [r["validation_loss"] for r in parquet[1:]] == [float(rows[run]["validation_loss"]) for run in RUNS]


def test_seeds_share_their_programs(tmp_path):
    """The training step of two seeds is one program, and so is the validation step."""
    config = to_mapping(meshes.tiny("residual"))
    tokens, found = meshes.batch(meshes.tiny("residual")), set()
    for run in plan(config, seeds(2)):
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
    """A worker is killed, another one gets a signal, then the sweep gets one; the last call is left alone."""
    workdir = file.parent / "killed"
    command = ("sweep", file, f"--workdir={workdir}", "--workers=1", "--select=2/2")
    first, second = RUNS[0], RUNS[2]
    Worker.at |= {first: (5, signal.SIGKILL), second: (4, signal.SIGTERM)}
    status, _, err = run_here(*command)
    assert status == 1, err
    assert f"{first} failed (killed by SIGKILL, perhaps for want of memory)" in err
    assert read_json(workdir / ".sweep" / "failed" / f"{first}.json")["error"].startswith("killed by SIGKILL")
    assert table(workdir)[first]["status"] == "failed"
    assert f"{second} failed (stopped by a signal from elsewhere; saved: " in err
    assert read_json(workdir / second / "summary.json")["status"] == "interrupted"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "asleep", {first})
        patch.setattr(runner, "time", Clock({1.0: lambda: signal.raise_signal(signal.SIGINT)}))
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
    """Assert that the two runs that were stopped ended like those of a sweep that was left alone; the others have not begun."""
    assert (table(workdir)[FAILS]["status"], table(workdir)[RUNS[1]]["status"]) == ("pending", "pending")
    for run in RUNS[::2]:
        events = [line["event"] for line in lines(workdir / run, "event") if line["event"] == "resumed"]
        assert 1 <= len(events) <= 3
        assert_same_run(workdir / run, done / run)
        assert table(workdir)[run] == table(done)[run]


@pytest.mark.full
def test_real_workers_are_killed_and_stopped_and_the_table_is_the_same(tmp_path, monkeypatch):
    """As above with processes, and with a killed sweep, whose worker saves and ends.  Seeds compile once.

    Half-written compiled programs change nothing.
    """
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
    with (workdir / second / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its worker outlived the sweep, and has saved
        assert read_json(workdir / second / "summary.json")["status"] == "interrupted"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; a preexec_fn would fork, which JAX warns of
    try:
        status, _, err = run_script(*command, env=at_step({first: (6, signal.SIGINT, "parent")}))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130, err
    assert "Run the same command to go on" in err
    assert holder(workdir / first) == "", "its worker has gone"

    programs = list((workdir / ".sweep" / "xla").glob("*-cache"))
    assert programs != []
    for program in programs:  # JAX writes them in place, so that a kill may leave half a file
        os.truncate(program, program.stat().st_size // 2)
    status, _, err = run_script(*command)
    assert status == 0, err
    check_gone_on(workdir, tmp_path / "done")


def test_a_worker_that_does_not_stop_is_killed_and_named(grid, tmp_path, monkeypatch, capsys, usual_sigint):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"

    def start(pool, run):
        process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        pool.active[run.name] = run, process
        pool.progress.started(run.name)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner._Pool, "_start", start)
    monkeypatch.setattr(runner, "GRACE_S", 0.3)
    assert runner.run_local(tmp_path / "sweep", grid, grid.runs, 1) == 130
    told = f"Stopped; {grid.runs[0].name} did not stop within 0.3 s and goes on from its last checkpoint. Run the same"
    assert told in capsys.readouterr().err


def test_a_worker_whose_sweep_has_gone_asks_itself_to_stop(monkeypatch):
    parents, sent, clock = iter([7, 7, 1]), [], Clock()
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *what: sent.append((clock.now, *what)))
    monkeypatch.setattr(worker, "time", clock)
    worker.watch(7)
    assert sent == [(2 * 0.5, os.getpid(), signal.SIGTERM)]


@pytest.fixture
def grid(tmp_path) -> Grid:
    """A grid of one run, whose folder is `tmp_path`/w/residual."""
    write_text(tmp_path / "text.txt")
    return Grid("title", plan(base(tmp_path), over("connection", ["residual"])))


def test_a_divergence_is_a_result_and_no_failure(grid, tmp_path, capsys):
    runs = plan(applied(base(tmp_path), {"model.embedding_init_std": 1e30}), over("connection", ["residual"]))
    assert runner.run_local(tmp_path / "w", Grid("title", runs), runs, 1) == 0
    row = table(tmp_path / "w")["residual"]
    assert (row["status"], row["error"]) == ("diverged", "")
    assert "failed" not in capsys.readouterr().err


def test_a_success_takes_an_earlier_failure_off_the_table(grid, tmp_path, monkeypatch):
    write_plan(tmp_path, grid)
    write_json(tmp_path / ".sweep" / "failed" / "residual.json", {"exit": 1, "error": "killed"})
    assert [row["error"] for row in result_rows(tmp_path)] == ["killed"]
    monkeypatch.setattr(worker, "train", lambda config, folder, label: {"status": "finished"})
    assert worker.run(tmp_path, "residual") == 0
    assert [row["error"] for row in result_rows(tmp_path)] == [None]


def test_a_run_that_another_process_has_is_left_alone(grid, tmp_path, monkeypatch, capsys):
    write_plan(tmp_path / "w", grid)
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    folder = tmp_path / "w" / "residual"
    folder.mkdir()
    with run_lock(folder):
        with pytest.raises(Busy, match=f"process {os.getpid()} on "):
            worker.run(tmp_path / "w", "residual")
        assert runner.run_local(tmp_path / "w", grid, grid.runs, 1) == 1
    assert clock.now > runner.PATIENCE_S
    assert f"residual was left to another sweep (process {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["lock"]


# Submitit's debug job leaves its logs open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_slurm_task_is_the_same_run(grid, tmp_path):
    pytest.importorskip("submitit")
    jobs = runner.submit(tmp_path / "w", grid, grid.runs, "debug", {"timeout_min": 1, "slurm_partition": "p"})
    assert [job.result() for job in jobs] == [0]
    assert table(tmp_path / "w")["residual"]["status"] == "finished"
    with pytest.raises(InputError, match="submitit refuses cluster"):
        runner.submit(tmp_path / "w", grid, grid.runs, "nowhere", {})


def test_without_submitit_a_slurm_array_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install submitit"):
        runner.submit(tmp_path, Grid("title", []), [], "slurm", {})


def test_a_run_that_was_begun_with_another_text_stops_the_sweep_before_its_first_start(grid, tmp_path):
    begun, others = tmp_path / "w" / "residual", plan(base(tmp_path), over("connection", ["hc"]))
    begun.mkdir(parents=True)
    write_json(begun / "config.json", to_mapping(grid.runs[0].config))
    write_json(begun / "env.json", {"data": {"train_sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"The training text is not the one that .*residual was trained with"):
        runner.prepare(tmp_path / "w", Grid("title", [*grid.runs, *others]), others)
    assert not (tmp_path / "w" / "sweep.json").exists()
