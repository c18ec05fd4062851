"""Functions with which the processes of a run join, agree with each other and end.

Every process runs the same program on its own devices, and arrays are sharded over the devices of all processes
(`jax.distributed`).  Process 0, the first process, alone prints progress and writes files.  The arrays of a checkpoint are an
exception: each process writes its own shards.  In a run of one process no function here waits or communicates.

If a process is lost, the others end with one sentence and the status `LOST` where the loss reaches Python as an exception.  Where
JAX's own threads notice it first, they abort the process (SIGABRT, status 134) and print what they know.  In jaxlib 0.10 Python
cannot take part in that: the argument `missed_heartbeat_callback` of JAX's client ends in std::bad_cast.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mhc_jax.errors import InputError, require, shown

LOST = 4
"""Exit status of a process that ends because another process of the run is gone or cannot be reached."""
BARRIER_TIMEOUT_S = 24 * 3600
"""Longest wait at a barrier, in seconds.  It is long, because one process may tokenize text for hours while the others wait."""
LINGER_S = 3.0
"""Seconds for which the first process waits before it ends after a failure.

It runs JAX's coordinator.  JAX aborts the other processes as soon as the coordinator is gone."""
TEXT_BYTES = 1024
"""Unit in bytes of the length to which `allgather_text` pads texts, so that few programs are compiled for it."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_UNREACHABLE = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Gloo|NCCL|[Cc]oordination|[Cc]onnection|[Ss]ocket|[Bb]arrier"
)
_barriers = itertools.count()

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Raised when another process of the run is gone or cannot be reached.  `process_lost_error` makes it."""


# ---------------------------------------------------------------------------------------------------------------- start


def launcher(environ: Mapping[str, str]) -> str:
    """Return the name of the launcher that started this process and tells JAX 0.10 about the other processes.

    Args:
      environ: environment variables after jax has been imported.

    Returns:
      `Slurm` (srun), `Open MPI` (to version 4; version 5 no longer tells the address of process 0), `Kubernetes` (an indexed Job;
      needs `pip install 'jax[k8s]'`), `Cloud TPU` (a worker of a slice, or a single host), or an empty string for none of them.
    """
    if all(name in environ for name in _SLURM):
        return "Slurm" if environ["SLURM_NTASKS"] != "1" else ""
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return "Open MPI" if environ["OMPI_COMM_WORLD_SIZE"] != "1" else ""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    # jax sets TPU_ML_PLATFORM if it finds libtpu and chips, or if $JAX_FORCE_TPU_INIT is set.  It sets TPU_SKIP_MDS_QUERY if it
    # finds no chips.
    chips = environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environ
    if "," in hosts or chips:
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return ""


def start(address: str = "", processes: int = 0, process: int = -1, wait_s: int = 300, silence_s: int = 100) -> None:
    """Join the other processes of the run, if there are any.  The call must come before JAX looks for devices.

    Args:
      address: host:port of process 0.  Empty means $JAX_COORDINATOR_ADDRESS, or else the address that the launcher tells.
      processes: number of processes.  0 means $JAX_NUM_PROCESSES, or else the number that the launcher tells.  1 means this process
        alone, whatever the launcher tells.
      process: number of this process, from 0.  -1 means $JAX_PROCESS_ID, or else the number that the launcher tells.
      wait_s: seconds within which all processes must have joined.
      silence_s: seconds without a heartbeat after which a process counts as dead, and JAX ends the other processes.

    Raises:
      InputError: the settings are incomplete or contradict each other.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _number("JAX_NUM_PROCESSES", 0)
    process = process if process >= 0 else _number("JAX_PROCESS_ID", -1)
    if processes == 1:
        return
    launched_by = launcher(os.environ)
    device = None
    if not launched_by and "OMPI_COMM_WORLD_SIZE" in os.environ and address:
        processes, process = _number("OMPI_COMM_WORLD_SIZE", 0), _number("OMPI_COMM_WORLD_RANK", -1)
        device = _number("OMPI_COMM_WORLD_LOCAL_RANK", 0)  # one device for each process, as JAX does under Open MPI 4
    given = {"--coordinator_address": address != "", "--num_processes": processes > 0, "--process_id": process >= 0}
    if not launched_by:
        if not any(given.values()):
            return
        missing = " and ".join(name for name, there in given.items() if not there)
        require(
            all(given.values()),
            f"{missing} must be given too: several processes need --coordinator_address=HOST:PORT (of process 0), "
            f"--num_processes and --process_id together, or $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID.",
        )
    require(
        not address or ((match := re.fullmatch(r".+:(\d{1,5})", address)) is not None and 0 < int(match[1]) < 1 << 16),
        f"--coordinator_address is {shown(address)}; it must be HOST:PORT of process 0, with a port from 1 to 65535.",
    )
    require(
        process < 0 or processes == 0 or process < processes,
        f"--process_id is {shown(process)} of --num_processes {shown(processes)}; it must lie between 0 and "
        f"{shown(processes - 1)}.",
    )
    _join(address, processes, process, device, launched_by, wait_s, silence_s)
    if is_multiprocess() and is_first_process():
        by = f" (started by {launched_by})" if launched_by else ""
        print(f"{jax.process_count()} processes{by} with {jax.device_count()} devices", file=sys.stderr, flush=True)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    require(re.fullmatch(r"[0-9]{0,9}", text) is not None, f"${name} is {shown(text)}; it must be a number below 10^9.")
    return int(text) if text else default


def _join(
    address: str, processes: int, process: int, device: int | None, launched_by: str, wait_s: int, silence_s: int
) -> None:
    # If some processes do not join, JAX aborts this process with a C++ stack trace.  The timer ends this process earlier, with an
    # error message of one sentence.
    def give_up() -> None:
        where = f"the coordinator at {address}" if address and process != 0 else "the other processes"
        print(
            f"error: After {wait_s} s {where} had not answered; see that all {processes or ''} processes are started and that "
            f"{address or 'the first host'} can be reached from every host.".replace("  ", " "),
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(wait_s, give_up)
    timer.daemon = True
    timer.start()
    # Gloo (collectives between CPUs) writes a line for each connection to file descriptor 1, where the run's summary goes too.  So
    # Python's stdout gets a copy of descriptor 1, and descriptor 1 becomes standard error.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            address or None,
            processes or None,
            process if process >= 0 else None,
            device,
            cluster_detection_method=None if launched_by else "deactivate",
            initialization_timeout=wait_s + 60,
            heartbeat_timeout_seconds=silence_s,
        )
        jax.devices()
    except (RuntimeError, ValueError) as error:
        # A TPU machine that belongs to no slice has no other processes to join.
        if launched_by == "Cloud TPU" and not address:
            return
        raise InputError(f"The processes could not be joined: {_first_line(error)}") from error
    finally:
        timer.cancel()
    # jax.distributed.initialize has replaced the handler of SIGTERM.  The earlier handler is restored, because a run of this code
    # stops at a signal by `StopRequest` and `Agreement`.
    signal.signal(signal.SIGTERM, handler)


# ---------------------------------------------------------------------------------------------------------------- agree


def is_multiprocess() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def is_first_process() -> bool:
    """Whether this process is process 0, the one that prints progress and writes files."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a line on the first process only."""
    if is_first_process():
        print(text, flush=True)


def barrier() -> None:
    """Wait until all processes have called this function.

    It must be called before a program's first collectives, because Gloo lets processes wait only 30 s for each other to connect.
    """
    if is_multiprocess():
        import orbax.checkpoint as ocp  # the import takes 1 s

        key = f"mhc_jax_{next(_barriers)}"
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_TIMEOUT_S * 1000)


def allgather_text(text: str) -> list[str]:
    """Return the texts that all processes give, in the order of the processes."""
    if not is_multiprocess():
        return [text]
    barrier()
    raw = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    if not sizes.any():
        return [""] * len(sizes)
    width = -(-int(sizes.max()) // TEXT_BYTES) * TEXT_BYTES
    rows = multihost_utils.process_allgather(np.frombuffer(raw.ljust(width, b"\0"), np.uint8))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def on_every_process(function: Callable[[], T]) -> T:
    """Call `function`, and wait until it has returned on all processes, each of which must call it by this function.

    Returns:
      The value that the function returned on this process.

    Raises:
      InputError: the function raised it on at least one process.  It is then raised on all processes.
    """
    if not is_multiprocess():
        return function()
    try:
        value, mistake = function(), None
    except InputError as error:
        value, mistake = None, error
    texts = allgather_text(str(mistake) if mistake else "")
    if mistake:
        raise mistake
    for process, text in enumerate(texts):
        require(not text, f"process {process} said: {text}")
    return value  # pyright: ignore[reportReturnType]


def require_same(text: str, sentence: str) -> None:
    """Raise `InputError(sentence)` on all processes unless all processes give the same `text`."""
    require(len(set(allgather_text(text))) == 1, sentence)


class Agreement:
    """An agreement of all processes on one number, the largest of the numbers that they give to `ask`.

    Its use: a signal such as SIGTERM may reach only one process, but all processes must stop after the same step.  Before every
    step each process gives the number of the signal that it has received, or 0.
    """

    def __init__(self, mesh: Mesh | None):
        self._pending: jax.Array | None = None
        if is_multiprocess() and mesh is not None:
            self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._largest = jax.jit(lambda a: a.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, number: int) -> int:
        """Start the computation of the largest `number` of all processes, and return the result of the previous call's computation.

        The first call returns 0.  The result comes one call late, so that the collective runs beside the training step that follows
        the call.  In a run of one process a call returns `number` itself.
        """
        if not is_multiprocess():
            return number
        previous, devices = self._pending, self._each.mesh.size
        numbers = jax.make_array_from_callback((devices,), self._each, lambda _: np.full(1, number, np.int32))
        self._pending = self._largest(numbers)
        return 0 if previous is None else int(previous)


# ------------------------------------------------------------------------------------------------------------------ end


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception of JAX or Orbax means that another process cannot be reached."""
    # Gloo, which connects CPUs, reports a lost process as a ValueError when a value is read, and as a JaxRuntimeError (a kind of
    # RuntimeError) when a program is started.
    if isinstance(error, InputError) or not isinstance(error, RuntimeError | ValueError):
        return False
    return is_multiprocess() and _UNREACHABLE.search(str(error)) is not None


def process_lost_error(error: BaseException, when: str = "", go_on: str = "") -> ProcessLostError:
    """Return the exception to raise in place of an `error` for which `is_lost_process` is true.

    Args:
      error: the exception of JAX or Orbax.
      when: words that say when the loss was noticed.
      go_on: words that say from which checkpoint the run can go on.
    """
    return ProcessLostError(
        f"Another process of the run has gone or cannot be reached{when} ({_first_line(error)}). Start the same command again on "
        f"every process{go_on}; with a mesh to match, on more or fewer."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def joined() -> bool:
    """Whether `start` has initialised `jax.distributed`, so that this process is joined with the others."""
    return jax.distributed.is_initialized()


def shutdown() -> None:
    """Leave `jax.distributed` at the end of the run.  All processes must call this function, and each waits for the others."""
    if joined():
        barrier()
        jax.distributed.shutdown()


def exit_if_joined(status: int) -> None:
    """End this process with exit status `status`, without waiting for other processes.  If it is not `joined`, only return."""
    if not joined():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first_process():
        time.sleep(LINGER_S)
    os._exit(status)  # Python's usual exit would wait for the other processes
