"""Eight simulated CPU devices, checked shape annotations, strict rank promotion, quick compiles that runs of the tests share."""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

# Programs of tests run once: with the last two, the compiler takes about half the time for them.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # a later XLA may not know this flag, and ends a process that sets it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
USER = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # each user of a machine has a cache of their own
CACHE = Path(os.environ.get("MHC_JAX_TEST_CACHE", Path(tempfile.gettempdir()) / f"mhc-jax-test-cache{USER}"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("MHC_JAX_CACHE", str(CACHE / "data"))
# JAX writes a compiled program in place, so that another process may read half a file, as may every process after a kill.  JAX then
# warns and compiles.  Scripts and notebooks that the tests start ignore that warning, as do the tests (`pytest_configure`).
HALF = "ignore:Error reading persistent compilation cache entry:UserWarning"
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), HALF]))
# FORCE_COLOR and TTY_ ask for bars where lines are expected.  JUPYTER_PATH may name kernels of another Python.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_PATH"):
    os.environ.pop(name, None)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # The user's home may hold a damaged list of fonts, and settings and kernels of IPython.  Workers inherit these folders.
    TOOLS = tempfile.mkdtemp(prefix="mhc-jax-test-tools-")
    atexit.register(shutil.rmtree, TOOLS, ignore_errors=True)
    os.environ |= {"MPLCONFIGDIR": f"{TOOLS}/matplotlib", "IPYTHONDIR": f"{TOOLS}/ipython"}
    os.environ |= {"JUPYTER_DATA_DIR": f"{TOOLS}/jupyter", "JUPYTER_PREFER_ENV_PATH": "1"}
    import matplotlib.font_manager  # noqa: F401  makes the list of fonts; a script that takes over 5 s for it would warn

from jaxtyping import install_import_hook  # noqa: E402

import mhc_jax.errors  # noqa: E402, F401  its checks of plain values are called too often for a check of their types

install_import_hook(["mhc_jax", "mhc_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # made now: a slice such as cpu:4 would otherwise decide how many there are, for all tests of the process
pytest.register_assert_rewrite("support")  # so that a failed assertion there shows its values
hypothesis.configuration.set_hypothesis_home_dir(CACHE / "hypothesis")
gc.set_threshold(50_000, 20, 20)  # tracing makes objects that stay: the usual threshold costs a tenth of the time
jax.config.update("jax_traceback_in_locations_limit", 0)
# The same examples at every run, nothing kept, and no verdict on how fast the machine is.
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW
)
hypothesis.settings.load_profile("repeatable")

MEMORY_LIMIT = 1.2 * 2**30
"""Bytes of a test process above which it forgets compiled programs."""


def memory_in_use() -> int:
    """Resident bytes of this process; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def pytest_configure(config):
    """Let a warning pass that says nothing of what is tested."""
    config.addinivalue_line("filterwarnings", HALF)


def pytest_runtest_teardown(nextitem):
    """Forget compiled programs once they take much memory; JAX keeps each of them for the life of the process."""
    if nextitem is not None and memory_in_use() > MEMORY_LIMIT:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def usual_sigint():
    """SIGINT as in a terminal; a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
