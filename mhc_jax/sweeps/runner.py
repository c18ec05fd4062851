"""Train the runs of a sweep in processes: side by side on this machine, or as a Slurm array."""

from __future__ import annotations

import contextlib
import dataclasses
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
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.loop import EXIT_CODES
from mhc_jax.runs.checkpoint import check_text
from mhc_jax.runs.cpu_variables import cpu_alone, cpu_variables
from mhc_jax.runs.environment import COMMAND
from mhc_jax.runs.environment import command as typed_command
from mhc_jax.runs.folder import check_run_folder, recorded_data, respelled
from mhc_jax.runs.lock import Busy, holder
from mhc_jax.runs.progress import Display, SweepProgress
from mhc_jax.runs.stop import StopRequest
from mhc_jax.sweeps.bisection import next_runs
from mhc_jax.sweeps.grid import Grid, Run, write_plan
from mhc_jax.sweeps.results import failure_file, run_status, write_results
from mhc_jax.sweeps.worker import BUSY
from mhc_jax.sweeps.worker import run as run_one

POLL_S = 0.2
PATIENCE_S = 20.0
"""Seconds to wait for runs that other processes train, if no other run is left.  Workers of a killed sweep end in this time."""
GRACE_S = 120.0
"""Seconds from SIGTERM to SIGKILL.  In this time a worker finishes its step and saves its run."""
ERROR_LINES = 8
"""Number of lines at the end of a run's log that its `failure_file` keeps."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def default_workers() -> int:
    """Return the number of runs to train at the same time: 1 on a machine with a GPU or TPU, else one for every two CPU cores."""
    accelerator = Path("/dev/nvidia0").exists() or Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return 1 if accelerator else max(1, cores() // 2)


def prepare(workdir: Path, grid: Grid, selected: Sequence[Run]) -> list[Run]:
    """Check every run folder, tokenize the data once, write the plan of the sweep, and return the selected runs that are not done.

    If any run is not done, the page of the sweep (report.html) is removed, because it is about to be out of date.

    Raises:
      InputError: a run folder cannot be used, data cannot be read, or a run was begun with another training text.
    """
    todo = [run for run in selected if not check_run_folder(workdir / run.name, to_mapping(run.config))]
    # The text of a run that has ended is read too if its name has changed.
    renamed = [run for run in grid.runs if respelled(workdir / run.name, to_mapping(run.config))]

    def text_of(run: Run) -> tuple[Any, ...]:
        data = run.config.data
        return data.source, data.validation_source, data.validation_fraction, data.tokenizer

    identities = {}
    with Display(workdir.name) as display:
        for text, run in {text_of(run): run for run in [*renamed, *todo]}.items():
            data = load_data(run.config.data, display.during)
            identities[text] = data.identity
            for line in data.describe(run.config.train.validation_batches):
                display.say(line)
    # Runs that are not selected are checked too, because another machine may have begun them.
    for run in grid.runs:
        if read := identities.get(text_of(run)):
            check_text(recorded_data(workdir / run.name), read, workdir / run.name)
    write_plan(workdir, grid)
    if todo:
        (workdir / "report.html").unlink(missing_ok=True)
    return todo


def run_local(workdir: Path, grid: Grid, selected: Sequence[Run], workers: int) -> int:
    """Train the selected runs that are not done, `workers` of them at a time, and keep the results table up to date.

    A failure of a run is recorded, and the other runs go on.  On SIGINT or SIGTERM, every worker saves its run and ends, and a
    later call with the same arguments continues the saved runs.

    Returns:
      Exit status: 0 if all runs finished or diverged, 1 if some runs failed or are trained by another process, 130 if a signal
      stopped the call.

    Raises:
      InputError: `workers` is below 1, or `prepare` raises it.  No run has been started then.
    """
    require(workers >= 1, f"--workers is {workers}; it must be at least 1.")
    todo = prepare(workdir, grid, selected)
    pool = _Pool(workdir, todo, workers, len(selected) - len(todo))
    try:
        with pool.progress, StopRequest(pool.progress.say) as stop:
            pool.work(stop)
    finally:
        killed = pool.kill()
        write_results(workdir)
    for name, reason in pool.failed.items():
        print(f"{name} failed ({reason}); see {workdir / 'logs' / name}.log", file=sys.stderr)
    for name, process in pool.waiting.items():
        print(f"{name} was left to another sweep ({process})", file=sys.stderr)
    if stop.signal is not None:
        saved = "every run is saved"
        if killed:
            saved = f"{', '.join(killed)} did not stop within {GRACE_S:g} s and goes on from its last checkpoint"
        print(f"Stopped; {saved}. Run the same command to go on.", file=sys.stderr)
        return EXIT_CODES["interrupted"]
    return 1 if pool.failed or pool.waiting else 0


def run_bisection(workdir: Path, grid: Grid, workers: int) -> int:
    """Train the runs of the grid that its bisection asks for, one of each line in each round, until every line is decided.

    A later call with the same arguments goes on where this one was stopped.  A line whose run fails is left out, and the others go
    on.  `over` in sweep.json says whether every line was decided.

    Returns:
      Exit status: 0 if every line was decided, otherwise the status of `run_local`.

    Raises:
      InputError: `run_local` raises it.
    """
    assert grid.bisection is not None
    rule, tried, worst = grid.bisection, set[str](), 0

    def outcome(run: Run) -> bool | None:
        status = run_status(workdir, run.name)
        loss = read_json(workdir / run.name / "summary.json").get("validation_loss") if status == "finished" else None
        return rule.stable(status, loss)

    while True:
        # A run that this call has tried, and that has not ended, has failed.
        wanted = [run for run in next_runs(grid.runs, rule, outcome) if run.name not in tried]
        tried |= {run.name for run in wanted}
        part = [run for run in grid.runs if run.name in tried or outcome(run) is not None]
        status = run_local(workdir, dataclasses.replace(grid, runs=part), wanted, workers)
        worst = max(worst, status)
        if status == EXIT_CODES["interrupted"] or not wanted:
            break
    if worst == 0:
        plan = read_json(workdir / "sweep.json")
        plan["bisection"]["over"] = True
        write_json(workdir / "sweep.json", plan)
    return worst


class _Pool:
    """The pool of worker processes with which one call of `run_local` trains runs, and the queue of runs."""

    def __init__(self, workdir: Path, todo: Sequence[Run], workers: int, done: int):
        self.workdir, self.workers = workdir, workers
        self.queue = deque(todo)
        self.active: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        self.failed: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.progress = SweepProgress(workdir, {run.name: run.config.train.steps for run in todo}, done)

    def work(self, stop: StopRequest) -> None:
        """Start workers and wait for them, until no run is left to train or a signal asks to stop; then stop all workers."""
        patience = time.monotonic() + PATIENCE_S
        while (self.queue or self.active) and stop.signal is None:
            self._start_free()
            if self.active:
                patience = time.monotonic() + PATIENCE_S
            elif time.monotonic() > patience:
                return
            time.sleep(POLL_S)
            self._reap(stopping=False)
            self.progress.update()
        if stop.signal is not None:
            for _, process in self.active.values():
                process.terminate()
            deadline = time.monotonic() + GRACE_S
            while self.active and time.monotonic() < deadline:
                time.sleep(POLL_S)
                self._reap(stopping=True)

    def kill(self) -> list[str]:
        """Kill the workers that still run, because `work` raised an error or they took longer than `GRACE_S` to stop.

        Returns:
          The names of their runs.
        """
        for _, process in self.active.values():
            process.kill()
            process.wait()
        return list(self.active)

    def _start_free(self) -> None:
        """Start queued runs until `workers` runs are active.  Runs that another process trains go to the end of the queue."""
        for _ in range(len(self.queue)):
            if len(self.active) == self.workers:
                return
            run = self.queue.popleft()
            if name := holder(self.workdir / run.name):
                self.waiting[run.name] = name
                self.queue.append(run)
            else:
                self.waiting.pop(run.name, None)
                self._start(run)

    def _start(self, run: Run) -> None:
        share = str(max(1, cores() // self.workers))
        env = {
            **os.environ,
            **(cpu_variables() if cpu_alone() else {}),
            # XLA's CPU client reads the size of its thread pool from NPROC.
            "NPROC": share,
            "OMP_NUM_THREADS": share,
            "PYTHONUNBUFFERED": "1",
            COMMAND: typed_command(),
        }
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str((self.workdir / ".sweep" / "xla").resolve()))
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        command = [sys.executable, "-m", "mhc_jax.sweeps.worker", str(self.workdir), run.name, str(os.getpid())]
        with (self.workdir / "logs" / f"{run.name}.log").open("ab") as log:
            # The worker gets a session of its own, so that Ctrl-C sends it no signal.  This process sends it a single SIGTERM
            # instead, because a second signal would end the worker before it has saved its run.
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
                self.progress.waits(name)
                continue
            if code not in (EXIT_CODES["finished"], EXIT_CODES["diverged"]) and not stopping:
                self.failed[name] = record_failure(self.workdir, name, code)
            write_results(self.workdir)
            self.progress.ended(name, run_status(self.workdir, name))


def record_failure(workdir: Path, name: str, code: int) -> str:
    """Write exit status and last log lines of a failed run to its `failure_file`.  Return the reason in a few words."""
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
    """The function that a task of a Slurm array calls to train one run in the task's process."""

    def __init__(self, workdir: Path):
        self.workdir, self.command = workdir.resolve(), typed_command()

    def __call__(self, name: str) -> int:
        """Train a run and return its exit status, as `worker.run` does.  An error is written to `failure_file` and raised again."""
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.workdir / ".sweep" / "xla"))
        os.environ[COMMAND] = self.command
        os.environ.update(cpu_variables() if cpu_alone() else {})
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
    """Submit the selected runs that are not done as one Slurm array, with a task for each run, and return the jobs of submitit.

    Args:
      workdir: a folder on a file system that the nodes share.
      grid: the whole grid of the sweep.
      selected: runs of the grid that may be trained.
      cluster: where submitit runs the tasks: `slurm`, `local` (processes on this machine) or `debug` (this process).
      parameters: arguments of `submitit.AutoExecutor.update_parameters`, such as slurm_partition.

    Raises:
      InputError: submitit is not installed or refuses the cluster or a parameter, or `prepare` raises it.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("Slurm arrays need submitit: pip install submitit.") from None
    todo = prepare(workdir, grid, selected)
    try:
        executor = submitit.AutoExecutor(folder=str(workdir.resolve() / "logs" / "slurm"), cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        raise InputError(f"submitit refuses cluster {cluster!r} with {json.dumps(parameters)}: {error}") from error
    return executor.map_array(SlurmTask(workdir), [run.name for run in todo])
