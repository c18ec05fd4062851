"""A sweep repeats no run that is done, goes on with failed, killed and stopped ones, and writes its table and record.

Workers run in this process; only the tests marked `full` start real ones.
"""

import csv
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from support import meshes
from support.in_process import run_here
from support.synthetic_runs import write_run
from support.tiny_runs import ROOT, assert_same_run, at_step, lines, run_script, write_text
from support.tiny_sweep import base, write_sweep
from support.workers_here import Clock, Worker, workers_here

from mhc_jax.analysis.grouping import group
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.reports.record import read_newest, read_record, shortened, write_record, write_runs
from mhc_jax.runs.lock import Busy, holder, run_lock
from mhc_jax.sweeps import runner, worker
from mhc_jax.sweeps.grid import Grid, applied, over, plan, product, seeds, write_plan
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
    """As above with processes, and with a killed sweep, whose worker saves and ends.  Seeds compile once."""
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


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """Folder of a sweep whose four runs read a file of this machine and have ended."""
    folder, source = tmp_path / "runs" / "pair", "/x/texts/train.jsonl.zst"
    points = product(over("connection", ["residual", "hc"]), seeds(2))
    runs = plan(applied(to_mapping(ExperimentConfig()), {"data.source": source}), points)
    write_plan(folder, Grid("Two kinds, two seeds.", runs))
    for run in runs:
        place = write_run(folder, run.name, run.config.model.connection.kind, seed=run.config.train.seed)
        write_json(place / "config.json", to_mapping(run.config))
        env = {"packages": {"jax": "0.10.2"}, "python": "3.11.7", "device_count": 1, "data": {"source": source}}
        env["command"] = f"python experiments/sweep.py {tmp_path}/pair.py --config.data.source={source}"
        write_json(place / "env.json", read_json(place / "env.json") | env)
        (place / "checkpoints").mkdir()
    return folder


def test_record_of_a_sweep(ended, tmp_path):
    folder = write_record(ended, tmp_path / "records" / "2026-01-02-sweep-pair", metrics=True, note="A note.")
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.csv", "runs.json", "metrics"}
    names = ["hc-seed0", "hc-seed1", "residual-seed0", "residual-seed1"]
    assert sorted(path.name for path in (folder / "metrics").iterdir()) == [f"{name}.jsonl" for name in names]
    for path in folder.rglob("*.*"):
        assert not any(place in path.read_bytes() for place in (b"/home", str(tmp_path).encode())), path
    readme = (folder / "README.md").read_text()
    for part in (
        "\n    python experiments/sweep.py pair.py --config.data.source=train.jsonl.zst\n",
        "Shared settings that are not defaults: data.source=train.jsonl.zst.",
        "4 runs: 4 finished",
        "| hc | 2 | 1.6",
        "A note.",
    ):
        assert part in readme
    settings = group(read_record(folder))
    assert [setting.label for setting in settings] == ["hc", "residual"]
    assert len(settings[0].any_run.train["step"]) == 100
    assert [run.folder for run in read_newest(folder.parent, "pair")] == [folder / name for name in names]
    with pytest.raises(
        InputError, match=r"no record of the sweep 'width' yet; make it with `python experiments/sweep\.py"
    ):
        read_newest(folder.parent, "width")


def test_a_run_is_listed_with_the_settings_it_was_trained_with(ended, tmp_path):
    before = result_rows(ended)
    shutil.copytree(ended, tmp_path / "sweep")
    planned = tmp_path / "sweep" / ".sweep" / "runs" / "hc-seed0.json"
    planned.write_text(planned.read_text().replace('"learning_rate": 0.0', '"learning_rate": 0.1'))
    assert planned.read_text() != (ended / ".sweep" / "runs" / "hc-seed0.json").read_text()
    assert result_rows(tmp_path / "sweep") == before


def test_record_without_metrics_has_summaries_alone(ended, tmp_path):
    runs = read_record(write_record(ended, tmp_path / "record"))
    assert [len(run.train["step"]) for run in runs] == [0, 0, 0, 0]
    assert all(run.result("validation_loss") for run in runs)
    assert runs[0].tokens == 200 * runs[0].config["data"]["batch_size"] * runs[0].config["data"]["sequence_length"]
    with (tmp_path / "record" / "results.csv").open() as table:
        assert len(list(csv.DictReader(table))) == 4


def test_runs_of_a_record_are_those_of_the_run_folders(ended, tmp_path):
    """Every value comes back with its type, also where one run has another value or lacks the key."""
    folders = {name: ended / name for name in ("hc-seed0", "hc-seed1", "residual-seed0", "residual-seed1")}
    config = read_json(folders["hc-seed1"] / "config.json")
    config["model"]["connection"]["disable"] = ["pre", "post"]
    config["optimizer"] |= {"grad_clip": int(config["optimizer"]["grad_clip"]), "extra": {"a": {"b": []}}}
    write_json(folders["hc-seed1"] / "config.json", config)
    env = read_json(folders["residual-seed0"] / "env.json")
    write_json(folders["residual-seed0"] / "env.json", {**env, "packages": {"a.b": "1"}, "optimizer": [{"x/y": 1}]})
    before = [read_run(folder) for folder in folders.values()]
    texts = []
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        write_runs([*folders.values()][:: 1 if place.name == "one" else -1], place, metrics=True)
        texts.append((place / "runs.json").read_text())
    assert texts[0] == texts[1]
    for old, new in zip(before, read_record(tmp_path / "one"), strict=True):
        for part in ("config", "env", "summary"):
            expected = shortened(json.dumps(getattr(old, part), sort_keys=True))
            assert json.dumps(getattr(new, part), sort_keys=True) == expected
        assert new.name == old.name
        assert new.events == old.events
        for part in ("train", "validation"):
            columns, expected = getattr(new, part), getattr(old, part)
            assert list(columns) == list(expected)
            assert all(np.array_equal(columns[key], expected[key], equal_nan=True) for key in columns)
        assert len(new.diagnostics) == len(old.diagnostics)
    written = json.loads(texts[0])
    assert written["config"]["model"]["width"] == before[0].config["model"]["width"]
    assert "model.connection.disable" in written["runs"][1]["config"]
    (line,) = [line for line in texts[0].splitlines() if '"hc-seed1"' in line]
    assert json.loads(line.rstrip(",")) == written["runs"][1]


def test_a_sweep_with_a_run_that_has_not_ended_is_refused_unless_told(ended, tmp_path):
    begun, interrupted, pending = ("hc-seed1", "hc-seed0", "residual-seed1")
    (ended / begun / "summary.json").unlink()
    summary = ended / interrupted / "summary.json"
    write_json(summary, read_json(summary) | {"status": "interrupted"})
    shutil.rmtree(ended / pending)
    with pytest.raises(InputError, match=rf"3 of 4 runs .*\({pending}, {interrupted}, {begun}\); .*--unfinished"):
        write_record(ended, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    write_record(ended, tmp_path / "record", unfinished=True)
    readme = (tmp_path / "record" / "README.md").read_text()
    assert all(f"1 {status}" in readme for status in ("finished", "begun", "interrupted", "pending"))
    assert [run.name for run in read_record(tmp_path / "record")] == ["residual-seed0"]
    with pytest.raises(InputError, match="there already"):
        write_record(ended, tmp_path / "record", unfinished=True)
    shutil.rmtree(ended / "residual-seed0")
    with pytest.raises(InputError, match="No run of"):
        write_record(ended, tmp_path / "nothing", unfinished=True)
    with pytest.raises(InputError, match="is no record"):
        read_record(tmp_path / "nothing")
