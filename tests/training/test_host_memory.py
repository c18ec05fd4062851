"""A program's temporaries take no page faults once it has run."""

import subprocess
import sys

import pytest

from mhc_jax.runs import host_memory

COUNT = """
import resource, runpy, sys
if sys.argv[1] == "keep":
    assert runpy.run_path(sys.argv[2])["keep_pages"]()
{setup}
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {call}
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[10], {size})
"""
PROGRAM = """
import jax, jax.numpy as jnp
def f(x):  # 64 MiB for what the first loop leaves to the second
    last, saved = jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=64)
    return jax.lax.scan(lambda c, s: (c + s * c, None), last, saved, reverse=True)[0]
f = jax.jit(f)
x = jnp.ones(1 << 18)
"""
SIZE = "f.lower(x).compile().memory_analysis().temp_size_in_bytes"
BYTES = ("", "b'x' * (1 << 26)", "1 << 26")
COMPILED = pytest.param((PROGRAM, "jax.block_until_ready(f(x))", SIZE), marks=pytest.mark.full)


def faults(setup: str, call: str, size: str, how: str) -> int:
    """The median number of page faults of a call that takes at least 64 MiB."""
    command = [sys.executable, "-c", COUNT.format(setup=setup, call=call, size=size), how, host_memory.__file__]
    count, taken = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert taken >= 2**26
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("case", [BYTES, COMPILED], ids=["a string of bytes", "a compiled program"])
def test_freed_memory_stays(case):
    if faults(*case, "give back") < 1000:
        pytest.skip("this system hands out memory without faults")
    assert faults(*case, "keep") < 1000


@pytest.mark.parametrize(("asked", "alone"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_it_is_for_processors_alone(monkeypatch, asked, alone):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    assert host_memory.cpu_alone() == alone
