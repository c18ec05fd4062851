"""Start the product's commands quickly: a process that has imported their libraries forks, and the child runs the command.

The campaign itself is the process that forks.  It imports what the scripts of `experiments/` import, and makes no JAX backend and
no thread.  A child is a session of its own.  It runs the script by `runpy` under the name `__main__`, with the arguments, the
environment and the files for output that the command would have.  Only the imports are missing from its life.  A share of the
starts are whole new interpreters (`Command.plain`), which shows that the short cut hides nothing.

Workers of a sweep are started by `subprocess.Popen`.  Within a child this is replaced by a fork as well.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from campaign import faults

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    *("mhc_jax.loop", "mhc_jax.cli", "mhc_jax.sweeps.runner", "mhc_jax.sweeps.worker", "mhc_jax.reports.page"),
    *("mhc_jax.reports.record", "mhc_jax.weights.folder", "mhc_jax.weights.llama", "mhc_jax.runs.trained"),
    *("mhc_jax.evaluation.run", "mhc_jax.data.train_tokenizer", "mhc_jax.generation", "mhc_jax.diagnostics"),
    *("safetensors.numpy", "tokenizers", "tensorstore", "pyarrow.parquet", "matplotlib.pyplot"),
)
"""Modules that the commands import."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "MHC_JAX_STARTED_AGAIN": "1",  # Otherwise a command would start itself again as a new interpreter.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
}
"""Variables of the environment that the campaign and all its commands have."""
POLL_S = 0.002
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


@dataclass(frozen=True)
class Command:
    """A command line of the product: a script of `experiments/`, or a module, and its arguments."""

    script: str
    """Name of a script of `experiments/` without .py, or `-m MODULE`."""
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    plain: bool = False
    """Whether a new interpreter runs the command."""

    @property
    def line(self) -> list[str]:
        """The command as it would be typed."""
        what = self.script.split() if self.script.startswith("-m ") else [str(ROOT / f"experiments/{self.script}.py")]
        return [sys.executable, *what, *self.arguments]


def preload(scratch: Path) -> None:
    """Set the environment of the campaign, import the modules of the commands, and adopt orphans of its descendants.

    JAX reads its variables when it is imported, so the variables come first.
    """
    os.environ.update(ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "xla")})
    os.environ.pop("XLA_FLAGS", None)
    for name in MODULES:
        importlib.import_module(name)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    gc.freeze()


class Child:
    """A started command, whose output goes to two files."""

    def __init__(self, pid: int, out: Path, err: Path):
        self.pid, self.out, self.err = pid, out, err
        self.began = time.monotonic()
        self.status: int | None = None
        """Exit status, or minus the number of the signal that ended it; None while it runs."""

    def poll(self) -> int | None:
        """Return the status if the command has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float) -> int | None:
        """Wait for the end for some seconds.  Return the status, or None if the command still runs."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What the command has written to its standard error."""
        return self.err.read_text(errors="replace") if self.err.exists() else ""


def start(command: Command, logs: Path, fault: faults.Fault | None = None) -> Child:
    """Start a command, whose output goes to new files in the folder `logs`.  `fault` says what befalls it (`faults.arm`)."""
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.glob("*.err")))
    out, err = logs / f"{number}.out", logs / f"{number}.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        if command.plain:
            process = subprocess.Popen(
                command.line, env={**os.environ, **command.env}, cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=stderr, start_new_session=True,
            )  # fmt: skip
            process.returncode = 0  # Its status is read by `Child.poll`, and not by this object.
            return Child(process.pid, out, err)
        pid = _fork()
        if pid == 0:
            _become(
                command.script,
                command.arguments,
                {**os.environ, **command.env},
                stdout.fileno(),
                stderr.fileno(),
                fault,
            )
        return Child(pid, out, err)


def call(function: Callable[[], Any]) -> Any:
    """Call a function in a forked child and return its result, which is a JSON value.

    The campaign thereby stays free of threads of TensorStore and JAX.

    Raises:
      RuntimeError: the function has raised an exception, whose traceback is the message.
    """
    read, write = os.pipe()
    pid = _fork()
    if pid == 0:
        os.close(read)
        try:
            text = json.dumps({"result": function()})
        except BaseException:
            text = json.dumps({"error": traceback.format_exc()})
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    answer = json.loads(text or '{"error": "the child died"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


def descendants(pid: int | None = None) -> list[int]:
    """Return the processes that descend from a process (default: from this one), without those that have ended."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [os.getpid() if pid is None else pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def strays(seconds: float) -> list[str]:
    """Wait for all descendants of the campaign to end.  Kill those that have not, and return their command lines."""
    end = time.monotonic() + seconds
    while left := descendants():
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    reap()
    names = []
    for pid in left:
        try:
            names.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] + f" ({pid})")
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    time.sleep(POLL_S)
    reap()
    return names


def reap() -> None:
    """Collect the statuses of orphans that have ended, which the campaign has adopted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def _become(
    script: str, arguments: Sequence[str], env: Mapping[str, str], out: int, err: int, fault: faults.Fault | None
) -> None:
    """Run a command in this forked child, and end the process with its status as an interpreter would end it."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(ROOT)
        _configure_jax()
        _replace_popen(fault)
        faults.arm(fault)
        module = script.removeprefix("-m ")
        sys.argv = [module if script.startswith("-m ") else str(ROOT / f"experiments/{script}.py"), *arguments]
        try:
            if script.startswith("-m "):
                del sys.modules[module]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(ROOT / "experiments")
                runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            traceback.print_exc()
            status = 130
        except BaseException:
            traceback.print_exc()
        # What the interpreter does at its end, but for taking modules apart.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _configure_jax() -> None:
    """Give JAX, which was imported already, the folder of compiled programs that the environment names."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _replace_popen(fault: faults.Fault | None) -> None:
    """Let a sweep fork its workers.  The fault befalls the worker with this number if it is meant for a worker."""
    from mhc_jax.sweeps import runner

    count = iter(range(1 << 30))

    class Worker(Child):
        def __init__(self, command: Sequence[str], env: Mapping[str, str], stdin, stdout, stderr, start_new_session):
            assert (command[1], stdin, start_new_session) == ("-m", subprocess.DEVNULL, True)
            its = fault.for_worker(next(count)) if fault else None
            pid = _fork()
            if pid == 0:
                faults.disarm()
                _become(" ".join(command[1:3]), command[3:], env, stdout.fileno(), stderr.fileno(), its)
            super().__init__(pid, Path(os.devnull), Path(os.devnull))

        def wait(self, seconds: float = 600) -> int | None:
            return super().wait(seconds)

        def terminate(self) -> None:
            self.kill(signal.SIGTERM)

    runner.subprocess = SimpleNamespace(Popen=Worker, DEVNULL=subprocess.DEVNULL)  # pyright: ignore[reportAttributeAccessIssue]
