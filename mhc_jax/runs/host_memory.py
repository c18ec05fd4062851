"""The memory of a host whose processors do the computing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Names and numbers of malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cpu_alone() -> bool:
    """Whether JAX will run on the CPU, because nothing else is asked for or installed; it is not started for that."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_pages() -> bool:
    """Let glibc keep memory that is freed, for programs of XLA's CPU backend.  Call this before JAX starts its threads.

    XLA:CPU allocates the temporaries of a program at every call and frees them after it.  glibc gives blocks of that size back to
    the system, and the page faults at the next call cost a fifth of the processor time of the demo's mHC.  Afterwards there are
    none, and the process never shrinks.

    Returns:
      False where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    # One arena, because only that of the main thread can grow to any size.  No request, however large, is mapped by itself.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
