"""Train the runs of a sweep in processes: side by side on this machine, or as a Slurm array."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhc_jax.config.mapping import to_mapping
from mhc_jax.data import load_data
from mhc_jax.errors import InputError, require
from mhc_jax.loop import EXIT_CODES
from mhc_jax.runs.checkpoint import check_text
from mhc_jax.runs.environment import COMMAND
from mhc_jax.runs.environment import command as typed_command
from mhc_jax.runs.folder import check_run_folder, recorded_data, write_json
from mhc_jax.runs.progress import SweepProgress
from mhc_jax.runs.stop import StopRequest
from mhc_jax.sweeps.grid import Busy, Grid, Run, run_lock, write_plan
from mhc_jax.sweeps.results import failure_file, run_status, write_results
from mhc_jax.sweeps.worker import BUSY
from mhc_jax.sweeps.worker import run as run_one

POLL_S = 0.2
PATIENCE_S = 20.0
"""Seconds to wait for runs that another process holds.  The workers of a killed sweep save and end within seconds."""
GRACE_S = 120.0
"""Seconds from SIGTERM to SIGKILL, in which a worker finishes its step and saves."""
ERROR_LINES = 8
"""Number of last lines of a run's log that the record of its failure keeps."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def default_workers() -> int:
    """Return the number of processes to run side by side: one for every two cores, but one alone with a GPU or TPU."""
    accelerator = Path("/dev/nvidia0").exists() or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return 1 if accelerator else max(1, cores() // 2)


def prepare(workdir: Path, grid: Grid, selected: Sequence[Run]) -> list[Run]:
    """Check every run folder, write the plan, tokenize the data once, and return the runs that are not done.

    If any run is to be trained, the page of the sweep is removed, because it may show another grid than the folder will hold.

    Raises:
      InputError: a run folder cannot be used, data cannot be read, or a run was begun with another text.  It is raised before
        the first run starts.
    """
    todo = [run for run in selected if not check_run_folder(workdir / run.name, to_mapping(run.config))]

    def text_of(run: Run) -> tuple[Any, ...]:
        data = run.config.data
        return data.source, data.validation_source, data.validation_fraction, data.tokenizer

    identities = {}
    for text, run in {text_of(run): run for run in todo}.items():
        data = load_data(run.config.data)
        identities[text] = data.identity
        print("\n".join(data.describe(run.config.train.validation_batches)), file=sys.stderr)
    for run in grid.runs:  # runs that were begun on another machine are checked, too
        if read := identities.get(text_of(run)):
            check_text(recorded_data(workdir / run.name), read, workdir / run.name)
    write_plan(workdir, grid)
    if todo:
        (workdir / "report.html").unlink(missing_ok=True)
    return todo


def run_local(workdir: Path, grid: Grid, selected: Sequence[Run], workers: int) -> int:
    """Train the selected runs that are not done, `workers` processes side by side, and keep the results table up to date.

    A failure of a run is recorded, and the other runs go on.  SIGINT and SIGTERM make every process save and end.  A call with
    the same arguments then continues the saved runs.

    Returns:
      Exit status: 0 when all runs are done (a divergence is a result), 1 when some runs failed or are held by another process,
      130 when stopped.

    Raises:
      InputError: `workers` is below 1, or `prepare` refuses the runs.  It is raised before the first run starts.
    """
    require(workers >= 1, f"--workers is {workers}; it must be at least 1.")
    todo = prepare(workdir, grid, selected)
    pool = _Pool(workdir, todo, workers, len(selected) - len(todo))
    try:
        with pool.progress, StopRequest() as stop:
            pool.work(stop)
    finally:
        pool.kill()
        write_results(workdir)
    for name, reason in pool.failed.items():
        print(f"{name} failed ({reason}); see {workdir / 'logs' / name}.log", file=sys.stderr)
    for name, holder in pool.waiting.items():
        print(f"{name} was left to another sweep ({holder})", file=sys.stderr)
    if stop.signal is not None:
        print("Stopped; every run is saved. Run the same command to go on.", file=sys.stderr)
        return EXIT_CODES["interrupted"]
    return 1 if pool.failed or pool.waiting else 0


class _Pool:
    """The pool of processes with which one call of `run_local` trains runs."""

    def __init__(self, workdir: Path, todo: Sequence[Run], workers: int, done: int):
        self.workdir, self.workers = workdir, workers
        self.queue = deque(todo)
        self.active: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        self.failed: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.progress = SweepProgress(workdir, len(todo) + done, done)

    def work(self, stop: StopRequest) -> None:
        """Start processes and wait for them, until no run is left to train or a signal asks to stop."""
        patience = time.monotonic() + PATIENCE_S
        while (self.queue or self.active) and stop.signal is None:
            self._start_free()
            if self.active:
                patience = time.monotonic() + PATIENCE_S
            elif time.monotonic() > patience:
                return
            time.sleep(POLL_S)
            self._reap(stopping=False)
            self.progress.update({name: run.config.train.steps for name, (run, _) in self.active.items()})
        if stop.signal is not None:
            for _, process in self.active.values():
                process.terminate()
            deadline = time.monotonic() + GRACE_S
            while self.active and time.monotonic() < deadline:
                time.sleep(POLL_S)
                self._reap(stopping=True)

    def kill(self) -> None:
        """Kill the processes that still run.  There are such processes only if `work` was cut short."""
        for _, process in self.active.values():
            process.kill()
            process.wait()

    def _start_free(self) -> None:
        """Start queued runs as long as there is room.  Runs that another process holds go to the end of the queue."""
        for _ in range(len(self.queue)):
            if len(self.active) == self.workers:
                return
            run = self.queue.popleft()
            try:
                with run_lock(self.workdir, run.name):
                    self.waiting.pop(run.name, None)
            except Busy as holder:
                self.waiting[run.name] = str(holder)
                self.queue.append(run)
            else:
                self._start(run)

    def _start(self, run: Run) -> None:
        share = str(max(1, cores() // self.workers))
        env = {
            **os.environ,
            # NPROC is the size of the thread pool of XLA's CPU client.
            "NPROC": share,
            "OMP_NUM_THREADS": share,
            "PYTHONUNBUFFERED": "1",
            COMMAND: typed_command(),
        }
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str((self.workdir / ".sweep" / "xla").resolve()))
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        command = [sys.executable, "-m", "mhc_jax.sweeps.worker", str(self.workdir), run.name, str(os.getpid())]
        with (self.workdir / "logs" / f"{run.name}.log").open("ab") as log:
            # In a new session Ctrl-C reaches this process alone, which then asks each worker once.
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.active[run.name] = (run, process)
        self.progress.started(run.name)

    def _reap(self, stopping: bool) -> None:
        for name, (run, process) in list(self.active.items()):
            if (code := process.poll()) is None:
                continue
            del self.active[name]
            if code == BUSY:
                self.queue.append(run)
                continue
            if code not in (EXIT_CODES["finished"], EXIT_CODES["diverged"]) and not stopping:
                self.failed[name] = record_failure(self.workdir, name, code)
            write_results(self.workdir)
            self.progress.ended(name, run_status(self.workdir, name))


def record_failure(workdir: Path, name: str, code: int) -> str:
    """Record the failure of a run: the exit status and the last lines of its log.  Return the reason in a few words."""
    reason = f"exit status {code}"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        reason += ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    elif code == EXIT_CODES["interrupted"]:
        reason = "stopped by a signal from elsewhere; saved"
    lines = (workdir / "logs" / f"{name}.log").read_text(errors="replace").splitlines()[-ERROR_LINES:]
    write_json(failure_file(workdir, name), {"exit": code, "error": "\n".join([reason, *lines])})
    return f"{reason}: {lines[-1]}" if lines and code > 0 else reason


class SlurmTask:
    """A task of a Slurm array, which trains one run in its own process, as a local worker does."""

    def __init__(self, workdir: Path):
        self.workdir, self.command = workdir.resolve(), typed_command()

    def __call__(self, name: str) -> int:
        """Train one run and return its exit status.  A failure is recorded and then raised."""
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.workdir / ".sweep" / "xla"))
        os.environ[COMMAND] = self.command
        try:
            return run_one(self.workdir, name)
        except Busy:
            return BUSY
        except Exception as error:
            write_json(failure_file(self.workdir, name), {"exit": 1, "error": f"{type(error).__name__}: {error}"})
            with contextlib.suppress(OSError):
                write_results(self.workdir)
            raise
        finally:
            del os.environ[COMMAND]


def submit(workdir: Path, grid: Grid, selected: Sequence[Run], cluster: str, parameters: dict[str, Any]) -> list[Any]:
    """Submit the selected runs that are not done as one Slurm array, with a task for each run, and return submitit's jobs.

    Args:
      workdir: a folder on a file system that the nodes share.
      grid: the whole grid of the sweep.
      selected: runs of the grid that may be trained.
      cluster: `slurm`, or `local` or `debug` of submitit.
      parameters: arguments of `submitit.AutoExecutor.update_parameters`, such as slurm_partition.

    Raises:
      InputError: submitit is missing, or refuses the cluster or a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("Slurm arrays need submitit: pip install 'mhc-jax[slurm]'.") from None
    todo = prepare(workdir, grid, selected)
    try:
        executor = submitit.AutoExecutor(folder=str(workdir.resolve() / "logs" / "slurm"), cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        raise InputError(f"submitit refuses cluster {cluster!r} with {json.dumps(parameters)}: {error}") from error
    return executor.map_array(SlurmTask(workdir), [run.name for run in todo])
