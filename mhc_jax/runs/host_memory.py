"""Settings of memory allocation for a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of mallopt, with their numbers from malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cpu_alone() -> bool:
    """Return whether JAX will run on the CPU, because no other platform is asked for or installed.  JAX is not started."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_pages() -> bool:
    """Make glibc keep freed memory for the next call of an XLA:CPU program.  Call this before JAX starts its threads.

    XLA:CPU allocates the temporaries of a program at every call and frees them after it.  glibc gives such large blocks back
    to the system.  The page faults at the next call cost a fifth of the processor time of the demo's mHC.  With this setting
    there are no such page faults, and the memory of the process never shrinks.

    Returns:
      Whether the settings were made; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    # One arena, because only the arena of the main thread can grow to any size.  Even large requests are served from it.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
