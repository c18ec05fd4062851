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
STARTS = """
import os, pathlib, sys
from mhc_jax.runs import cpu_variables
cpu_variables._PAGES_OF_LINUX = pathlib.Path(os.environ["PAGES"])
os.write(3, b"start ")
cpu_variables.set_cpu_variables()
os.write(3, f"go on {sys.argv[1:]}".encode())
"""
"""It says in descriptor 3 how often it starts, and with which arguments it goes on."""
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


@pytest.mark.parametrize(
    ("command", "starts"),
    [
        ("{} -W error -u script.py a 'b c'", 2),
        ("{} -m script a 'b c'", 2),
        ("{} script.py a 'b c' >&-", 2),
        ("{} script.py a 'b c' 2>&-", 2),
        ("{} -m cProfile -o profile script.py a 'b c'", 2),
        ("{} - a 'b c' <script.py", 1),
        ("{} -W error - a 'b c' <script.py", 1),
        ("cat script.py | {} /dev/stdin a 'b c'", 1),
        ("{} inside.py", 1),
        ("{} -m trace --count --coverdir=counts script.py a 'b c'", 1),
    ],
)
def test_the_program_goes_on_once_however_it_was_started(tmp_path, command, starts):
    (tmp_path / "enabled").write_text("always [madvise] never")
    (tmp_path / "script.py").write_text(STARTS)
    # As a notebook does, the next program runs the script inside itself.
    (tmp_path / "inside.py").write_text(
        "import runpy, sys\nsys.argv = ['script.py', 'a', 'b c']\nrunpy.run_path('script.py', run_name='__main__')\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MHC_JAX_STARTED_AGAIN")}
    env |= {
        "PAGES": str(tmp_path / "enabled"),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
    }
    line = f"exec 3>said; {command.format(sys.executable)}"
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert (tmp_path / "said").read_text() == "start " * starts + "go on ['a', 'b c']"


def test_a_program_that_cannot_be_started_again_goes_on(monkeypatch, tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never")
    monkeypatch.setattr(cpu_variables, "_PAGES_OF_LINUX", tmp_path / "enabled")
    monkeypatch.setattr(cpu_variables, "_named_by_command_line", lambda: True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    for name in ("GLIBC_TUNABLES", "XLA_FLAGS", "MHC_JAX_STARTED_AGAIN"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what is set below
        monkeypatch.delenv(name)
    cpu_variables.set_cpu_variables()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(("asked", "alone"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_it_is_for_processors_alone(monkeypatch, asked, alone):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    assert cpu_variables.cpu_alone() == alone
