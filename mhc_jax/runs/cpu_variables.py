"""Variables of the environment with which a process computes faster if JAX uses the CPU alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

_HUGE_PAGES = "glibc.malloc.hugetlb"
_AGAIN = "MHC_JAX_STARTED_AGAIN"
"""Name of a variable that says that the program was started again, so that it never is twice."""
_LEVEL = "xla_backend_optimization_level"
_PAGES_OF_LINUX = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_alone() -> bool:
    """Return whether JAX will use the CPU alone: $JAX_PLATFORMS says so, or is not set and no other platform is installed."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def cpu_variables() -> dict[str, str]:
    """Return the variables that are missing in the environment of a process that computes on the CPU, by name.

    GLIBC_TUNABLES: glibc asks Linux for huge pages (2 MiB).  XLA:CPU allocates the temporary arrays of a program at every call.
    With pages of 4 KiB each call of the demo's train step has 18,000 (residual) to 28,000 (mHC) page faults, with huge pages
    about 500.  This needs glibc 2.35, and a Linux that gives huge pages to programs that ask.

    XLA_FLAGS: LLVM optimizes at level 1 instead of 3.  XLA has vectorized a program before LLVM gets it, so that the results
    and times of the demo's train step stay the same.  The compilation takes a quarter less time.
    """
    variables = {}
    tunables, flags = os.environ.get("GLIBC_TUNABLES", ""), os.environ.get("XLA_FLAGS", "")
    asks = _PAGES_OF_LINUX.exists() and "[madvise]" in _PAGES_OF_LINUX.read_text()
    if asks and _HUGE_PAGES not in tunables:
        variables["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    if _LEVEL not in flags and (
        not flags or flags.lstrip().startswith("-")
    ):  # else it is the name of a file with flags
        variables["XLA_FLAGS"] = f"{flags} --{_LEVEL}=1".strip()
    return variables


def set_cpu_variables() -> None:
    """Set `cpu_variables`, and start this program again in the same process if glibc has to read them, which it does at the start.

    Call this before JAX compiles anything.  If the program cannot be started again, it goes on without huge pages: it was read from
    standard input or from a pipe, it runs inside another program such as a notebook, or a debugger traces it.
    """
    variables, again = cpu_variables(), _AGAIN in os.environ
    os.environ.update(variables | {_AGAIN: "1"})
    if "GLIBC_TUNABLES" in variables and sys.executable and not again and _named_by_command_line():
        with contextlib.suppress(OSError):
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: the process began with this stream closed
                stream.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _named_by_command_line() -> bool:
    """Return whether the command line of this process names this program, as FILE or as `-m MODULE`, and no debugger traces it."""
    name, *arguments = sys.orig_argv[-len(sys.argv) :]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    as_file = name == sys.argv[0] and (Path(name).is_file() or Path(name).is_dir())
    as_module = spec is not None and name in (spec.name, spec.parent)
    return arguments == sys.argv[1:] and (as_file or as_module) and sys.gettrace() is None
