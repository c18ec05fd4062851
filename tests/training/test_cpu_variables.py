"""Programs on the CPU run with huge pages, and are compiled at a level of optimization that costs no speed."""

import os
import subprocess
import sys

import pytest

from mhc_jax.runs import cpu_variables

SCRIPT = """
import os, sys
from mhc_jax import cli
print(os.getpid())
cli.main(lambda: print(os.environ.get("GLIBC_TUNABLES"), os.environ["XLA_FLAGS"], sys.argv[1:]), computes=True)
"""
FAULTS = """
import resource
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 26)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[10])
"""


def faults(**variables):
    """The median number of page faults of an allocation of 64 MiB."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | variables
    return int(subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, check=True).stdout)


def test_huge_pages_take_few_faults(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    tunables = cpu_variables.cpu_variables().get("GLIBC_TUNABLES")
    if tunables is None or faults() < 1000:
        pytest.skip("this system has no huge pages to ask for")
    assert faults(GLIBC_TUNABLES=tunables) < 1000


@pytest.mark.parametrize("pages", ["always [madvise] never", "[always] madvise never"])
@pytest.mark.parametrize("given", [{}, {"GLIBC_TUNABLES": "a.b=1", "XLA_FLAGS": "--x=1"}])
def test_variables_are_added_to_those_of_the_user(monkeypatch, tmp_path, pages, given):
    for name in ("GLIBC_TUNABLES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "enabled").write_text(pages)
    monkeypatch.setattr(cpu_variables, "_PAGES_OF_LINUX", tmp_path / "enabled")
    variables = cpu_variables.cpu_variables()
    flags = "--x=1 --xla_backend_optimization_level=1" if given else "--xla_backend_optimization_level=1"
    tunables = "a.b=1:glibc.malloc.hugetlb=1" if given else "glibc.malloc.hugetlb=1"
    assert variables == {"XLA_FLAGS": flags} | ({"GLIBC_TUNABLES": tunables} if "[madvise]" in pages else {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cpu_variables.cpu_variables() == {}


def test_a_script_starts_again_once_in_the_same_process(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", "XLA_FLAGS", "MHC_JAX_STARTED_AGAIN")
    }
    command = [sys.executable, tmp_path / "script.py", "--verbosity=0"]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    restarted = len(lines) == 3
    assert len(set(lines[:-1])) == 1
    expected = "glibc.malloc.hugetlb=1" if restarted else "None"
    assert lines[-1] == f"{expected} --xla_backend_optimization_level=1 ['--verbosity=0']"


@pytest.mark.parametrize(("asked", "alone"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_it_is_for_processors_alone(monkeypatch, asked, alone):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    assert cpu_variables.cpu_alone() == alone
