"""Eight simulated CPU devices, checked shape annotations, strict rank promotion, a compile cache shared by runs of the tests."""

import os
import signal
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(os.environ.get("MHC_JAX_TEST_CACHE", Path(tempfile.gettempdir()) / "mhc-jax-test-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MHC_JAX_CACHE", str(CACHE / "data"))

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["mhc_jax", "mhc_kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def usual_sigint():
    """SIGINT as in a terminal; a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
