"""Settings of the memory allocation of glibc, for a process in which JAX computes on the CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Numbers of the parameters of the C function mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cpu_alone() -> bool:
    """Return whether JAX will use the CPU alone: $JAX_PLATFORMS says so, or is not set and no other platform is installed."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_pages() -> bool:
    """Make glibc keep freed memory for the next call of an XLA:CPU program.  Call this before JAX starts its threads.

    XLA:CPU allocates the temporary arrays of a program at every call and frees them after it.  glibc returns the memory of
    large arrays to the operating system, so that the next call has page faults.  In the demo they took a fifth of the processor
    time of mHC's train step.  With these settings there are no such page faults, and the memory of the process never shrinks.

    Returns:
      Whether the settings were made; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # the C library musl has no mallopt
        return False
    # The main thread's arena is the only one, because no other can grow to any size.  With M_MMAP_MAX = 0 it serves large requests.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
