"""No file that is read as data can run code: the names that would do so occur in known places alone."""

import ast

import pytest
from support.tiny_runs import ROOT

FILES = sorted(file for folder in ("mhc_jax", "experiments", "kernels") for file in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"run_path", "run_module", "exec_module", "loads_pickle", "unsafe_load"}
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only", "shell"}
ALLOWED = {
    # Python files of the user, which are named as such: functions of a source or an optimizer, sweep files and their config files.
    ("mhc_jax/user_functions.py", "run_path"),
    ("mhc_jax/sweeps/grid.py", "run_path"),
    # Files that lie beside these and have fixed names.
    ("mhc_jax/reports/questions.py", "run_path"),
    ("experiments/configs/board.py", "run_path"),
    ("experiments/sweeps/muon_rates.py", "run_path"),
    ("experiments/sweeps/which_map_large.py", "run_path"),
}


def dangerous(tree: ast.AST) -> set[str]:
    """Return the names in a program that can run code from data."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & MODULES
            found |= {alias.name for alias in node.names} & METHODS
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else ""
            method = called.attr if isinstance(called, ast.Attribute) else ""
            found |= ({name} & (CALLS | METHODS)) | ({method} & METHODS)
            if method == "system" and isinstance(called, ast.Attribute) and ast.unparse(called.value) == "os":
                found.add("os.system")
            for keyword in node.keywords:
                # weights_only=True and allow_pickle=False are the safe values.
                safe = {"weights_only": True}.get(keyword.arg or "", False)
                if keyword.arg in KEYWORDS and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is safe
                ):
                    found.add(keyword.arg or "")
    return found


def test_no_program_runs_code_from_data():
    found = {
        (file.relative_to(ROOT).as_posix(), name) for file in FILES for name in dangerous(ast.parse(file.read_text()))
    }
    assert len(FILES) > 150
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import pickle", {"pickle"}),
        ("from yaml import load", {"yaml"}),
        ("eval('1')", {"eval"}),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", {"allow_pickle"}),
        ("np.load('x', allow_pickle=False)", set()),
        ("torch.load('x', weights_only=False)", {"weights_only"}),
        ("torch.load('x', weights_only=True)", set()),
        ("subprocess.run('ls', shell=True)", {"shell"}),
        ("model.eval(); re.compile('x'); jitted.lower().compile()", set()),
        ("runpy.run_path(file)", {"run_path"}),
        ("os.system('ls')", {"os.system"}),
    ],
)
def test_the_search_finds_each_of_them(code, names):
    assert dangerous(ast.parse(code)) == names
