"""Several processes of one run: how they start, agree and end.

Every process runs the same program on its own devices, and arrays lie over the devices of all (`jax.distributed`).  Process 0
is the first: it alone prints progress and writes what is no array.  With one process everything here does nothing.
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

from mhc_jax.errors import InputError, require

LOST = 4
"""Exit status: another process of the run has gone."""
WAIT_S = 24 * 3600
"""Longest wait at a barrier: one process may read or tokenize for hours before the others; that it lives, heartbeats tell."""
LINGER_S = 3.0
"""The first process keeps the coordinator up so long after a failure: JAX aborts a process that cannot reach it."""
TEXT = 4096
"""Bytes a process can tell the others at once."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_LOSS = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Gloo|NCCL|[Cc]oordination|[Cc]onnection|[Ss]ocket|[Bb]arrier"
)
_barriers = itertools.count()

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Another process of the run has gone; one sentence says where the run can go on from."""


# ---------------------------------------------------------------------------------------------------------------- start


def launcher(environ: Mapping[str, str]) -> str:
    """Who can tell JAX 0.10 of other processes, by the environment once jax is imported; empty: nobody.

    `Slurm` (srun), `Open MPI` (to version 4; version 5 no longer tells the address of its head), `Kubernetes` (an indexed Job;
    needs `pip install 'jax[k8s]'`), `Cloud TPU` (a worker of a slice; one host is found out by asking).
    """
    if all(name in environ for name in _SLURM):
        return "Slurm" if environ["SLURM_NTASKS"] != "1" else ""
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return "Open MPI" if environ["OMPI_COMM_WORLD_SIZE"] != "1" else ""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    # jax sets the first where it finds libtpu and chips, the second where it finds no chips.
    chips = environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environ
    if "," in hosts or chips:
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return ""


def start(address: str = "", processes: int = 0, process: int = -1, wait_s: int = 300, silence_s: int = 100) -> None:
    """Join the other processes of the run, if there are any.  To be called before JAX looks for devices.

    Args:
      address: host:port of process 0; empty: $JAX_COORDINATOR_ADDRESS, or what the launcher tells.
      processes: how many there are; 0: $JAX_NUM_PROCESSES, or what the launcher tells; 1: this one alone, whoever started it.
      process: which of them this is, from 0; -1: $JAX_PROCESS_ID, or what the launcher tells.
      wait_s: seconds until all must have come.
      silence_s: seconds after which a process that gives no sign is taken for dead, and the others are ended by JAX.

    Raises:
      InputError: settings that are incomplete or contradict each other.
    """
    environ = os.environ
    address = address or environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _number("JAX_NUM_PROCESSES", 0)
    process = process if process >= 0 else _number("JAX_PROCESS_ID", -1)
    if processes == 1:
        return
    found = launcher(environ)
    device = None
    if not found and "OMPI_COMM_WORLD_SIZE" in environ and address:
        processes, process = _number("OMPI_COMM_WORLD_SIZE", 0), _number("OMPI_COMM_WORLD_RANK", -1)
        device = _number("OMPI_COMM_WORLD_LOCAL_RANK", 0)  # one each, as JAX does with version 4
    given = {"--coordinator_address": address != "", "--num_processes": processes > 0, "--process_id": process >= 0}
    if not found:
        if not any(given.values()):
            return
        missing = " and ".join(name for name, there in given.items() if not there)
        require(
            all(given.values()),
            f"{missing} must be given too: several processes need --coordinator_address=HOST:PORT (of process 0), "
            f"--num_processes and --process_id together, or $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID.",
        )
    require(
        not address or re.fullmatch(r".+:\d+", address) is not None,
        f"--coordinator_address is {address!r}; it must be HOST:PORT of process 0.",
    )
    require(
        process < 0 or processes == 0 or process < processes,
        f"--process_id is {process} of --num_processes {processes}; it must lie between 0 and {processes - 1}.",
    )
    _join(address, processes, process, device, found, wait_s, silence_s)
    if several() and first():
        by = f" (started by {found})" if found else ""
        print(f"{jax.process_count()} processes{by} with {jax.device_count()} devices", file=sys.stderr, flush=True)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    require(re.fullmatch(r"\d*", text) is not None, f"${name} is {text!r}; it must be a number.")
    return int(text) if text else default


def _join(
    address: str, processes: int, process: int, device: int | None, found: str, wait_s: int, silence_s: int
) -> None:
    # JAX aborts the process where it cannot reach all in time (a stack of C++); a timer of our own is there before it.
    come = threading.Event()

    def watch() -> None:
        if not come.wait(wait_s):
            where = f"the coordinator at {address}" if address and process != 0 else "the other processes"
            print(
                f"error: After {wait_s} s {where} had not answered; see that all {processes or ''} processes are started and "
                f"that {address or 'the first host'} can be reached from every host.".replace("  ", " "),
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    # Gloo (collectives between CPUs) reports each connection on the standard output of C, where our summary goes.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            address or None,
            processes or None,
            process if process >= 0 else None,
            device,
            cluster_detection_method=None if found else "deactivate",
            initialization_timeout=wait_s + 60,
            heartbeat_timeout_seconds=silence_s,
        )
        jax.devices()
    except (RuntimeError, ValueError) as error:
        if found == "Cloud TPU" and not address:  # a TPU machine that knows of no slice
            return
        raise InputError(f"The processes could not be joined: {_line(error)}") from error
    finally:
        come.set()
    signal.signal(
        signal.SIGTERM, handler
    )  # JAX's preemption service takes it, and `StopRequest` agrees on a step itself


# ---------------------------------------------------------------------------------------------------------------- agree


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if first():
        print(text, flush=True)


def barrier() -> None:
    """Wait for all processes: before collectives, whose connections are made within 30 s (Gloo) or not at all."""
    if several():
        import orbax.checkpoint as ocp  # 1 s

        ocp.multihost.get_barrier_sync_fn()(key=f"mhc_jax_{next(_barriers)}", timeout_ms=WAIT_S * 1000)


def gathered(text: str) -> list[str]:
    """What each process says, in their order; at most `TEXT` bytes of it."""
    if not several():
        return [text]
    barrier()
    raw = np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(raw)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(function: Callable[[], T]) -> T:
    """`function()` on every process; nobody goes on before all are done.

    Raises:
      InputError: on all processes, if one of them raised it.
    """
    if not several():
        return function()
    try:
        value, mistake = function(), None
    except InputError as error:
        value, mistake = None, error
    told = gathered(str(mistake) if mistake else "")
    if mistake:
        raise mistake
    for process, text in enumerate(told):
        require(not text, f"process {process} said: {text}")
    return value  # pyright: ignore[reportReturnType]


def same(text: str, sentence: str) -> None:
    """Raise `InputError(sentence)` on all processes unless all give the same text."""
    require(len(set(gathered(text))) == 1, sentence)


class Agreement:
    """A number that any process may raise, known to all at the same step."""

    def __init__(self, mesh: Mesh | None):
        self._asked: jax.Array | None = None
        if several() and mesh is not None:
            self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._largest = jax.jit(lambda a: a.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, number: int) -> int:
        """The largest number that a process gave at the call before, 0 at the first; alone: `number`.

        The answer of this call is on its way while the step after it runs, and is read at the next.
        """
        if not several():
            return number
        before, devices = self._asked, self._each.mesh.size
        given = jax.make_array_from_callback((devices,), self._each, lambda _: np.full(1, number, np.int32))
        self._asked = self._largest(given)
        return 0 if before is None else int(before)


# ------------------------------------------------------------------------------------------------------------------ end


def is_loss(error: BaseException) -> bool:
    """Whether an exception of JAX or Orbax says that another process cannot be reached."""
    # Gloo's errors come as ValueError where a value is read, as JaxRuntimeError where a program is started.
    if isinstance(error, InputError) or not isinstance(error, RuntimeError | ValueError):
        return False
    return several() and _LOSS.search(str(error)) is not None


def lost(error: BaseException, when: str = "", go_on: str = "") -> ProcessLostError:
    """The sentence for `is_loss`: `when` it was noticed, and where the run can `go_on` from."""
    return ProcessLostError(
        f"Another process of the run has gone or cannot be reached{when} ({_line(error)}). Start the same command again on every "
        f"process{go_on}; with a mesh to match, on more or fewer."
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def joined() -> bool:
    """Whether `start` has joined other processes."""
    return jax.distributed.is_initialized()


def shut() -> None:
    """Part from the others, who do the same: the run has ended."""
    if joined():
        barrier()
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """End this process with `status`, whatever the others do; returns where there are none."""
    if not joined():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if first():
        time.sleep(LINGER_S)
    os._exit(status)  # Python's own way out waits for the others
