"""That a program's temporaries take no page faults once it has run."""

import subprocess
import sys

import pytest

from mhc_jax import host_memory

PROGRAM = """
import resource, sys
from mhc_jax.host_memory import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages()
import jax, jax.numpy as jnp
def f(x):  # 64 MiB for what the first loop leaves to the second
    last, saved = jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=64)
    return jax.lax.scan(lambda c, s: (c + s * c, None), last, saved, reverse=True)[0]
f = jax.jit(f)
x = jnp.ones(1 << 18)
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(f(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(f.lower(x).compile().memory_analysis().temp_size_in_bytes, sorted(faults)[10])
"""


def run(how: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    temporaries, faults = map(int, done.stdout.split())
    return temporaries, faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_stays():
    temporaries, without = run("give back")
    assert temporaries >= 2**26
    if without < 1000:
        pytest.skip("this system hands out memory without faults")
    assert run("keep")[1] < 1000


@pytest.mark.parametrize(("asked", "alone"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_it_is_for_processors_alone(monkeypatch, asked, alone):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    assert host_memory.cpu_alone() == alone
