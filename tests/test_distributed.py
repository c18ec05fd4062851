"""Several real processes on loopback: the losses of one process, checkpoints between numbers of processes, and their ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import ROOT, data_of, final_state, flags_of, lines, measured, run_script, tiny, write_text

from mhc_jax import distributed
from mhc_jax.config import MeshConfig
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.sharding import make_mesh

KINDS = {"residual": "residual", "mhc": "mhc:num_streams=2:t_max=2"}
WAIT_S = 600  # of a process, on a machine that has other things to do


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def configuration(text):
    every = {"steps": 12, "diagnostics_every": 0, "checkpoint_every": 3, "keep_checkpoints": 9}
    return lambda kind: tiny(text, KINDS[kind], train=every)


@pytest.fixture(scope="module")
def alone(configuration, tmp_path_factory):
    """The losses of one process, by connection."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def losses(kind):
        if kind not in done:
            train(configuration(kind), folder / kind)
            done[kind] = losses_of(folder / kind)
        return done[kind]

    return losses


def losses_of(folder: Path) -> dict[tuple[str, int], float]:
    return {(line["kind"], line["step"]): line["loss"] for line in measured(folder) if line["kind"] != "diagnostics"}


def assert_same_losses(found, expected):
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-5)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(count, config, folder, *flags, signals=None, own=None):
    """(exit status, standard output, standard error) of each; `signals`: process -> (step, signal); `own`: flags of one."""
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    common = [*flags_of(config), f"--workdir={folder}", f"--coordinator_address=127.0.0.1:{free_port()}"]
    started = []
    for process in range(count):
        step, number = (signals or {}).get(process, (0, 0))
        command = [sys.executable, str(ROOT / "tests/one_process.py"), str(step), str(int(number)), *common, *flags]
        command += [f"--num_processes={count}", f"--process_id={process}", *(own or {}).get(process, ())]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipe))
    try:
        told = [process.communicate(timeout=WAIT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]


def sentences(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit())


def test_a_run_of_four_processes_goes_on_with_two_and_with_one(configuration, alone, tmp_path):
    """Stopped by SIGTERM to one of four, then by kill -9 of one of two, ended by one."""
    config, folder = configuration("residual"), tmp_path / "run"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    ends = processes(4, config, folder, *mesh, signals={2: (4, signal.SIGTERM)})
    assert [status for status, _, _ in ends] == [130] * 4, ends[0][2]
    summary = json.loads(ends[0][1])
    stopped = summary["steps"]
    assert (summary["status"], summary["processes"], summary["mesh"]) == ("interrupted", 4, "data 2, fsdp 2")
    assert 5 <= stopped <= 7
    assert checkpoints_of(folder)[-1] == stopped
    assert f"stopped by signal {int(signal.SIGTERM)} after step {stopped}; saved." in ends[0][2]
    assert "4 processes with 4 devices" in ends[0][2]
    for _, out, err in ends[1:]:
        assert (out, [line for line in err.splitlines() if "[Gloo]" not in line]) == ("", [])

    ends = processes(2, config, folder, "--config.mesh.data=2", signals={1: (10, signal.SIGKILL)})
    assert [status for status, _, _ in ends] == [distributed.LOST, -signal.SIGKILL], ends[0][2]
    (sentence,) = sentences(ends[0][2])
    assert sentence.startswith("error: Another process of the run has gone or cannot be reached, noticed at step 1")
    assert f"to go on from the checkpoint of step {checkpoints_of(folder)[-1]} in {folder}" in sentence
    assert "Traceback" not in ends[0][2]
    assert not (folder / "summary.json").exists()

    assert train(config, folder)["status"] == "finished"
    assert_same_losses(losses_of(folder), alone("residual"))
    resumed = [(line["event"], line.get("processes")) for line in lines(folder, "event")]
    assert resumed == [("interrupted", None), ("resumed", 2), ("resumed", None)]


def test_mhc_over_two_processes_that_share_every_sequence(configuration, alone, tmp_path):
    config, folder = configuration("mhc"), tmp_path / "run"
    ends = processes(2, config, folder, "--config.mesh.sequence=2")
    assert [status for status, _, _ in ends] == [0, 0], ends[0][2]
    assert json.loads(ends[0][1])["status"] == "finished"
    assert_same_losses(losses_of(folder), alone("mhc"))
    assert int(final_state(folder)["step"]) == 12
