import csv
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from support.tiny_runs import ROOT, assert_same_run, lines, run_script, script, write_text
from support.tiny_sweep import base, write_sweep

from mhc_jax import sweep_runner
from mhc_jax.errors import InputError
from mhc_jax.mapping import to_mapping
from mhc_jax.run_folder import read_json, write_json
from mhc_jax.sweep import (
    Busy,
    Grid,
    over,
    plan,
    run_lock,
    write_plan,
)

FAILS = "residual-compute_dtypefloat16"
RUNS = ["residual-seed0", "mhc-num_streams-2-seed0", "residual-seed1", "mhc-num_streams-2-seed1"]
TIMES = ("step_time_s", "date", "commit")


def table(workdir: Path) -> dict[str, dict]:
    """results.csv by run, without what differs between two calls."""
    with (workdir / "results.csv").open() as file:
        return {row["run"]: {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_sweep(folder, train={"steps": 600, "checkpoint_every": 100, "validate_every": 300})


@pytest.fixture(scope="module")
def own_cache():
    """Processes keep compiled programs where the sweep says, not in the cache of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def done(file, own_cache):
    """The whole sweep, uninterrupted: (folder, exit status, standard error)."""
    workdir = file.parent / "done"
    status, _, err = run_script("sweep", file, f"--workdir={workdir}", "--workers=1")
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
    row = rows["mhc-num_streams-2-seed1"]
    summary = read_json(workdir / "mhc-num_streams-2-seed1" / "summary.json")
    assert (row["connection"], row["kind"]) == ("mhc:num_streams=2:init=paper", "mhc")
    assert (row["seed"], row["data_seed"], row["model.connection.num_streams"]) == ("1", "1", "2")
    typed = read_json(workdir / "mhc-num_streams-2-seed1" / "env.json")["command"]
    assert typed == shlex.join(
        [
            "python",
            str(ROOT / "experiments" / "sweep.py"),
            str(workdir.parent / "tiny.py"),
            f"--workdir={workdir}",
            "--workers=1",
        ]
    )
    assert float(row["validation_loss"]) == summary["validation_loss"]
    assert int(row["parameters"]) == summary["parameters"]
    assert row["device"].startswith("cpu")
    trained = [line for line in lines(workdir / "residual-seed0", "train") if line["step"] > 2]
    assert float(rows["residual-seed0"]["max_grad_norm"]) == max(line["grad_norm"] for line in trained)
    parquet = pyarrow.parquet.read_table(workdir / "results.parquet").to_pylist()
    assert [r["validation_loss"] for r in parquet[1:]] == [float(rows[run]["validation_loss"]) for run in RUNS]


def test_seeds_compile_once(done):
    # train and validation step of two connections; a miss at the second seed would make eight
    assert len(list((done[0] / ".sweep" / "xla").glob("jit_step-*-cache"))) == 4


def test_a_second_call_repeats_nothing_but_the_failure(file, done):
    before = {run: (done[0] / run / "metrics.jsonl").stat().st_mtime_ns for run in RUNS}
    status, _, err = run_script("sweep", file, f"--workdir={done[0]}", "--workers=2")
    assert status == 1
    assert "4 of 5 runs are done already" in err
    assert [name for name in (FAILS, *RUNS) if f"{name}: started" in err] == [FAILS]
    assert before == {run: (done[0] / run / "metrics.jsonl").stat().st_mtime_ns for run in RUNS}
    status, out, _ = run_script("sweep", file, f"--workdir={done[0]}", "--list")
    assert status == 0
    assert out.splitlines() == [f"{FAILS}  failed", *[f"{run}  finished" for run in RUNS]]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def reached(folder: Path, step: int) -> bool:
    return (folder / "metrics.jsonl").exists() and any(line["step"] >= step for line in lines_so_far(folder))


def lines_so_far(folder: Path) -> list[dict]:
    whole = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole]


def holder(workdir: Path, run: str) -> int:
    return int((workdir / ".sweep" / "locks" / run).read_text().split()[1])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_killed_and_stopped_at_will_the_table_is_the_same(file, done, request):
    workdir = file.parent / "killed"
    command = ("sweep", file, f"--workdir={workdir}", "--workers=1", "--select=2/2")
    first, second = RUNS[0], RUNS[2]

    sweep = script(*command)
    request.addfinalizer(sweep.kill)
    wait_for(lambda: (workdir / first / "checkpoints" / "100").is_dir())
    os.kill(holder(workdir, first), signal.SIGKILL)  # one worker: recorded, and the sweep goes on
    wait_for(lambda: reached(workdir / second, 50))
    assert "killed by SIGKILL" in read_json(workdir / ".sweep" / "failed" / f"{first}.json")["error"]
    worker = holder(workdir, second)
    sweep.kill()  # the sweep itself: its worker saves and ends
    sweep.communicate()
    wait_for(lambda: gone(worker), 30)
    assert read_json(workdir / second / "summary.json")["status"] == "interrupted"

    # Inherited; a preexec_fn would fork, which JAX warns of.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    sweep = script(*command)
    signal.signal(signal.SIGINT, before)
    request.addfinalizer(sweep.kill)
    wait_for(lambda: len([e for e in lines_so_far(workdir / first) if e.get("event") == "resumed"]) == 1)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert "Run the same command to go on" in err
    assert gone(holder(workdir, first))

    status, _, err = run_script(*command)
    assert status == 0, err
    assert (table(workdir)[FAILS]["status"], table(workdir)[RUNS[1]]["status"]) == ("pending", "pending")
    for run in (first, second):
        events = [line["event"] for line in lines(workdir / run, "event") if line["event"] == "resumed"]
        assert 1 <= len(events) <= 3
        assert_same_run(workdir / run, done[0] / run)
        assert table(workdir)[run] == table(done[0])[run]


def test_a_run_that_another_process_has_is_left_alone(tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "text.txt")
    runs = plan(base(tmp_path), over("connection", ["residual"]))
    grid = Grid("title", runs)
    write_plan(tmp_path / "w", grid)
    monkeypatch.setattr(sweep_runner, "PATIENCE_S", 0.5)
    with run_lock(tmp_path / "w", "residual"):
        with pytest.raises(Busy, match=f"process {os.getpid()} on "), run_lock(tmp_path / "w", "residual"):
            pass
        assert sweep_runner.run_local(tmp_path / "w", grid, runs, 1) == 1
    assert f"residual was left to another sweep (process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "w" / "residual").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    write_plan(tmp_path, Grid("title", plan(base(tmp_path), [{}])))
    lock = tmp_path / ".sweep" / "locks" / "base"
    lock.write_text("process 999999999 on elsewhere\n")
    with run_lock(tmp_path, "base"):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # submitit's debug job leaves its logs open
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
