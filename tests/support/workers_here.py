"""Runs the workers of a sweep in the process of the tests, and ends them where a test says."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
from support.ends import Killed

from mhc_jax import loop
from mhc_jax.sweeps import runner, worker


class Worker:
    """Stands for `subprocess.Popen`, and runs the worker here when it is first asked how it ended.

    `at` maps a run to (step, signal): the worker gets the signal once, while the metrics of that step are read.
    `asleep` names runs that do nothing until they are asked to stop.
    """

    at: ClassVar[dict[str, tuple[int, int]]] = {}
    asleep: ClassVar[set[str]] = set()

    def __init__(self, command, env, stdin, stdout, stderr, start_new_session):
        *python, self.workdir, self.name, _ = command
        assert python == [sys.executable, "-m", "mhc_jax.sweeps.worker"]
        assert (stdin, stdout, start_new_session) == (subprocess.DEVNULL, stderr, True)
        self.env, self.log, self.code = env, Path(stdout.name), None

    def poll(self):
        if self.code is None and self.name not in self.asleep:
            with self.log.open("a") as log, pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["worker", self.workdir, self.name, "1"])
                for name, value in self.env.items():
                    patch.setenv(name, value)
                self.code = -signal.SIGKILL
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), contextlib.suppress(Killed):
                    self.code = worker.main()
        return self.code

    def terminate(self):
        self.code = 130

    def kill(self):
        assert self.code is not None, f"{self.name} was left running"

    def wait(self):
        return self.code


class Clock:
    """A clock that moves when someone sleeps; `at` maps a time to the function that is called then."""

    def __init__(self, at=None):
        self.now, self.at = 0.0, at or {}

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


@contextlib.contextmanager
def workers_here(at=None):
    """Runs of a sweep are trained in this process, and its clock moves when it sleeps; `at` is that of Worker."""
    read = loop.read

    def reading(run, history, step, metrics):
        at, number = Worker.at.get(run.progress.label, (0, 0))
        if step == at:
            del Worker.at[run.progress.label]
            if number == signal.SIGKILL:
                raise Killed
            signal.raise_signal(number)
        read(run, history, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "at", dict(at or {}))
        patch.setattr(loop, "read", reading)
        patch.setattr(runner, "subprocess", SimpleNamespace(Popen=Worker, DEVNULL=subprocess.DEVNULL))
        patch.setattr(runner, "time", Clock())
        patch.setattr(worker, "threading", mock.MagicMock())  # no thread watches for the end of this process
        patch.setattr(worker.logging, "set_verbosity", lambda level: None)
        yield
