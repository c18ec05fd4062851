"""Runs of several real processes on loopback: they give the losses of one process, go on with fewer, and end together."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.tiny_runs import PATIENCE_S, ROOT, at_step, data_of, flags_of, lines, measured, script, tiny, write_text

from mhc_jax.config import MeshConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.parallel import distributed
from mhc_jax.parallel.sharding import global_batch, local_rows, make_mesh

KINDS = {"residual": "residual", "mhc": "mhc:init=home:num_streams=2:t_max=2"}


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    every = {"steps": 12, "diagnostics_every": 0, "checkpoint_every": 3}
    return lambda kind: tiny(text, KINDS[kind], train=every)


def losses_of(folder: Path) -> dict[tuple[str, str, int], float]:
    values = ("loss", "bits_per_byte")
    return {(v, line["kind"], line["step"]): line[v] for line in measured(folder) for v in values if v in line}


def assert_losses_are_those_of_one_process(config, folder):
    train(config, folder.with_name("alone"))
    found, expected = losses_of(folder), losses_of(folder.with_name("alone"))
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=2e-5)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(count, config, folder, *flags, signals=None, extra=None):
    """Run processes to their ends, and return (exit status, standard output, standard error) of each.

    `signals` maps a process to (step, signal) that it sends to itself, and `extra` maps a process to further flags.
    """
    spec = KINDS[config.model.connection.kind]  # `flags_of` gives the kind alone
    common = [f"--config={ROOT}/experiments/configs/demo.py:{spec}", *flags_of(config)[1:], *flags]
    common += [f"--workdir={folder}", f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    started = []
    for process in range(count):
        env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        if process in (signals or {}):
            env |= at_step({folder.name: (*signals[process], "self")})
        started.append(script("train", *common, f"--process_id={process}", *(extra or {}).get(process, ()), env=env))
    try:
        told = [process.communicate(timeout=PATIENCE_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]


def sentences(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize(
    ("count", "axes"), [(2, {"data": 2}), pytest.param(4, {"data": 2, "fsdp": 2}, marks=pytest.mark.full)]
)
def test_a_run_of_processes_goes_on_with_fewer(count, axes, configuration, tmp_path):
    """SIGTERM to the last process stops all.  Of four, two go on and one of these is killed.  One process finishes the run."""
    config, folder = configuration("residual"), tmp_path / "run"
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in axes.items()]
    ends = processes(count, config, folder, *mesh, signals={count - 1: (4, signal.SIGTERM)})
    assert [status for status, _, _ in ends] == [130] * count, ends[0][2]
    summary = json.loads(ends[0][1])
    stopped, named = summary["steps"], ", ".join(f"{axis} {size}" for axis, size in axes.items())
    assert (summary["status"], summary["processes"], summary["mesh"]) == ("interrupted", count, named)
    assert 5 <= stopped == checkpoints_of(folder)[-1] <= 7
    assert f"stopped by SIGTERM after step {stopped}; saved." in ends[0][2]
    assert f"{count} processes with {count} devices" in ends[0][2]
    for _, out, err in ends[1:]:
        assert (out, [line for line in err.splitlines() if "[Gloo]" not in line]) == ("", [])

    if count == 4:
        ends = processes(2, config, folder, "--config.mesh.data=2", signals={1: (10, signal.SIGKILL)})
        assert [status for status, _, _ in ends] == [distributed.LOST, -signal.SIGKILL], ends[0][2]
        (sentence,) = sentences(ends[0][2])
        assert sentence.startswith("error: Another process of the run has gone or cannot be reached, noticed at step 1")
        assert f"to go on from the checkpoint of step {checkpoints_of(folder)[-1]} in {folder}" in sentence
        assert "Traceback" not in ends[0][2]
        assert not (folder / "summary.json").exists()

    checkpoint = checkpoints_of(folder)[-1]
    assert train(config, folder)["status"] == "finished"
    assert_losses_are_those_of_one_process(config, folder)
    told = [[line.get(key) for key in ("event", "step", "mesh", "processes")] for line in lines(folder, "event")]
    resumed = [["resumed", stopped, "data 2", 2]] * (count == 4) + [["resumed", checkpoint, None, None]]
    assert told == [["interrupted", stopped, None, None], *resumed]


@pytest.mark.full
def test_mhc_over_two_processes_that_share_every_sequence(configuration, tmp_path):
    config, folder = configuration("mhc"), tmp_path / "run"
    ends = processes(2, config, folder, "--config.mesh.sequence=2")
    assert [status for status, _, _ in ends] == [0, 0], ends[0][2]
    assert json.loads(ends[0][1])["status"] == "finished"
    assert_losses_are_those_of_one_process(config, folder)
    assert checkpoints_of(folder)[-1] == 12


@pytest.mark.slow
def test_the_others_end_when_the_coordinator_is_killed(configuration, tmp_path):
    """JAX may abort the others before they can print a sentence."""
    folder = tmp_path / "run"
    ends = processes(2, configuration("residual"), folder, "--config.mesh.data=2", signals={0: (8, signal.SIGKILL)})
    assert ends[0][0] == -signal.SIGKILL
    assert ends[1][0] in (distributed.LOST, -signal.SIGABRT), ends[1][2]
    assert "Another process of the run has gone" in ends[1][2] or "another task died" in ends[1][2]
    assert checkpoints_of(folder)[:1] == [3]


@pytest.mark.full
def test_a_mistake_of_one_process_ends_all(configuration, tmp_path):
    """Process 1 has another run folder, as a host that does not share the file system."""
    elsewhere, config = tmp_path / "elsewhere", configuration("residual")
    extra = {1: [f"--workdir={elsewhere}"]}
    ends = processes(2, config, tmp_path / "run", "--config.mesh.data=2", extra=extra)
    assert [status for status, _, _ in ends] == [2, 2], ends[0][2]
    told = f"{elsewhere} is not the folder that the first process writes to; give a run folder that all hosts share."
    assert sentences(ends[1][2]) == [f"error: {told}"]
    assert sentences(ends[0][2]) == [f"error: process 1 said: {told}"]
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.full
def test_a_process_with_the_folder_of_another_run_ends_all(configuration, tmp_path):
    """The other run has the same settings, so that only the lock tells the folders apart."""
    config, elsewhere = configuration("residual"), tmp_path / "elsewhere"
    train(config, elsewhere)
    for lost in (elsewhere / "summary.json", elsewhere / "checkpoints"):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    before = sorted(elsewhere.rglob("*"))
    ends = processes(2, config, tmp_path / "run", "--config.mesh.data=2", extra={1: [f"--workdir={elsewhere}"]})
    for status, _, err in ends:
        assert status == 2, err
        assert sentences(err)[-1].endswith(
            "The processes have different run folders; give all the same one, which all hosts share."
        )
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.full
def test_processes_with_other_settings_are_told_before_any_step(configuration, tmp_path):
    extra = {1: ["--config.optimizer.learning_rate=0.01", "--config.data.seed=7"]}
    ends = processes(2, configuration("residual"), tmp_path / "run", "--config.mesh.data=2", extra=extra)
    told = "Process 1 was started with other settings than process 0 (data.seed: 0 -> 7; optimizer.learning_rate: 0.003 -> 0.01)"
    for status, out, err in ends:
        assert (status, out) == (2, ""), err
        assert sentences(err) == [f"error: {told}; start the same command on every process."]
    assert not (tmp_path / "run").exists()


def test_settings_of_all_processes_are_compared_to_the_last_leaf(configuration, monkeypatch, tmp_path):
    """The other process is made up."""
    config = configuration("residual")
    other = to_mapping(config.with_settings(optimizer={"eps": 1e-19}))
    monkeypatch.setattr(distributed, "allgather_text", lambda text: [text, json.dumps(other)])
    with pytest.raises(
        InputError, match=r"Process 1 was .* process 0 \(optimizer.eps: 1e-20 -> 1e-19\); start the same"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("texts", [["", ""], ["short", ""], ["ü" * 5000, "x"]])
def test_texts_of_any_length_reach_all_processes_whole(texts, monkeypatch):
    """The arrays of the other process are made up."""
    others = iter([np.int32(len(texts[1].encode())), np.frombuffer(texts[1].encode().ljust(10_240, b"\0"), np.uint8)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    gather = lambda mine: np.stack([mine, next(others)[: len(mine)] if np.ndim(mine) else next(others)])  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    assert distributed.allgather_text(texts[0]) == texts


def test_a_mistake_of_one_process_is_raised_by_all(monkeypatch):
    """The texts of the other process are made up."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def refuse():
        raise InputError("mine")

    for other, function, sentence in (("", refuse, "^mine$"), ("theirs", int, "^process 1 said: theirs$")):
        monkeypatch.setattr(distributed, "allgather_text", lambda text, other=other: [text, other])
        with pytest.raises(InputError, match=sentence):
            distributed.on_every_process(function)
    monkeypatch.setattr(distributed, "allgather_text", lambda text: [text, ""])
    assert distributed.on_every_process(lambda: 5) == 5
    distributed.require_same("", "differ")
    with pytest.raises(InputError, match="differ"):
        distributed.require_same("a", "differ")


def test_processes_agree_on_the_largest_number_one_call_later(monkeypatch):
    """The eight devices play those of two processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agreement = distributed.Agreement(make_mesh(MeshConfig(data=8)))
    assert [agreement.ask(number) for number in (2, 15, 0, 9)] == [0, 2, 15, 0]


def test_a_coordinator_that_does_not_answer(configuration, tmp_path):
    one_of_two = ("--num_processes=2", "--process_id=1", "--start_timeout=2")
    ((status, _, err),) = processes(1, configuration("residual"), tmp_path / "run", extra={0: one_of_two})
    assert status == 2, err
    (sentence,) = sentences(err)
    assert sentence.startswith("error: After 2 s the coordinator at 127.0.0.1:")
    assert "had not answered; see that all 2 processes are started" in sentence
    assert not (tmp_path / "run").exists()


GIVEN: dict[str, Any] = {"address": "host:1234", "processes": 2, "process": 1}


@pytest.fixture
def bare(monkeypatch):
    """An environment without a launcher, and the list of arguments with which `_join` was called."""
    for name in list(os.environ):
        if re.match("JAX_(COORD|NUM|PROC)|SLURM_|OMPI_|TPU_|MEGASCALE_|KUBERNETES_", name):
            monkeypatch.delenv(name)
    joined = []
    monkeypatch.setattr(distributed, "_join", lambda *args: joined.append(args))
    return joined


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"address": ""}, "--coordinator_address must be given too: several processes need"),
        ({"processes": 0}, "--num_processes must be given too"),
        ({"process": -1, "address": ""}, "--coordinator_address and --process_id must be given too"),
        ({"address": "host"}, "--coordinator_address is 'host'; it must be HOST:PORT"),
        ({"process": 2}, "--process_id is 2 of --num_processes 2; it must lie between 0 and 1"),
    ],
)
def test_settings_half_given_are_a_sentence(given, sentence, bare):
    with pytest.raises(InputError, match=re.escape(sentence)):
        distributed.start(**(GIVEN | given))
    assert not bare


def test_settings_come_from_the_environment_too(bare, monkeypatch):
    distributed.start()
    distributed.start("host:1234", 1, 1)
    assert not bare
    for name, value in (("COORDINATOR_ADDRESS", "host:1234"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    distributed.start()
    distributed.start(process=1)
    assert [args[:5] for args in bare] == [("host:1234", 2, 0, None, ""), ("host:1234", 2, 1, None, "")]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'"):
        distributed.start()


SLURM = {"JOB_ID": "7", "STEP_NODELIST": "n[1-2]", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
SLURM = {f"SLURM_{name}": value for name, value in SLURM.items()}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, ""),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "Open MPI"),
        (OPEN_MPI, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
        ({"TPU_ML_PLATFORM": "JAX"}, "Cloud TPU"),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
    ],
)
def test_who_tells_of_other_processes(environ, name):
    assert distributed.launcher(environ) == name


def test_open_mpi_5_needs_the_address_alone(bare, monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    distributed.start(address="host:1234")
    assert [args[:5] for args in bare] == [("host:1234", 2, 1, 1, "")]


def test_a_mesh_covers_the_devices_of_all_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"\(data 2\) does not cover the 8 devices of the 2 processes"):
        make_mesh(MeshConfig(data=2))
    assert make_mesh(MeshConfig(data=2, fsdp=4)) is not None


def test_rows_that_processes_read_make_the_batch(configuration):
    """Data pipelines that read some rows have the batches and the state of one that reads all rows."""
    data = data_of(configuration("residual"))
    whole, *parts = (data.train_iterator(rows=rows) for rows in (None, np.array([0, 3]), np.array([1, 2])))
    for _ in range(40):
        batch, (outer, inner) = next(whole), (next(part) for part in parts)
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(batch[name][[0, 3]], outer[name])
            np.testing.assert_array_equal(batch[name][[1, 2]], inner[name])
    assert [part.get_state() for part in parts] == [whole.get_state()] * 2
    (held_out,), (rows,) = data.validation_batches(1), data.validation_batches(1, np.array([2]))
    np.testing.assert_array_equal(held_out["targets"][2:3], rows["targets"])


def test_local_rows_are_placed_where_the_sharding_wants_them():
    mesh = make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
    assert mesh is not None
    batch = np.arange(32, dtype=np.int32).reshape(4, 8)
    rows = local_rows(mesh, batch.shape)
    np.testing.assert_array_equal(rows, np.arange(4))
    placed = global_batch(mesh, batch.shape, rows, batch[rows])
    np.testing.assert_array_equal(placed, batch)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


def test_which_errors_mean_a_lost_process(monkeypatch):
    lost = [ValueError("UNKNOWN: Gloo all-reduce failed"), RuntimeError("UNAVAILABLE: Socket closed")]
    others = [InputError(str(lost[0])), InputError(str(lost[1])), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
    assert not any(map(distributed.is_lost_process, lost)), "one process cannot lose another"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert all(map(distributed.is_lost_process, lost))
    assert not any(map(distributed.is_lost_process, others))
