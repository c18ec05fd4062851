"""Memory of a host that computes itself."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cpu_alone() -> bool:
    """Whether JAX will run on the CPU, told without starting it: nothing else is asked for or installed."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_pages() -> bool:
    """Have glibc keep memory that is freed, for programs that run on XLA's CPU backend; False where there is no glibc.

    To be called before JAX starts its threads: those that have an arena of their own keep it.

    XLA:CPU asks for the temporaries of a program anew at every call and frees them after it: 131 MB a step in the demo's mHC.
    glibc gives blocks of that size back to the system, so that each step took 33,676 page faults, a fifth of its processor time;
    with this it takes none.  The process stays as large as it ever was.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    # One arena, because only that of the main thread can grow to any size; no block of its own for a large request.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
