"""Sweep files and sweep.json of any content give a grid or a sentence, before a folder is made."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.synthetic_runs import write_run
from support.tiny_sweep import base, write_sweep

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.errors import LONGEST_NAME, InputError
from mhc_jax.files.json_files import write_json
from mhc_jax.reports.page import write_folder_report
from mhc_jax.sweeps import grid
from mhc_jax.sweeps.bisection import Bisection
from mhc_jax.sweeps.field_types import check_types
from mhc_jax.sweeps.grid import ROOM, Sweep, load_sweep, plan, read_plan, run_name

SWEEP = '''"""Doc."""
from mhc_jax.sweeps.grid import *
from mhc_jax.sweeps.bisection import Bisection

def made(**fields):  # a sweep as it is where types are not checked, as they are in tests
    rule = Bisection("train.seed", 1.0)
    object.__setattr__(rule, "loss_below", None)
    sweep = Sweep(base="config.py", points=seeds(2))
    for name, value in fields.items():
        object.__setattr__(sweep, name, rule if value == "rule" else value)
    return sweep

def points(key, *values):
    return Sweep(base="config.py", points=over(key, values))

def get_sweep():
    return '''
FILES = {
    f"{SWEEP}made(points=5)": "points of the sweep is 5; give a list of points",
    f"{SWEEP}made(points='ab')": "points of the sweep is 'ab'",
    f"{SWEEP}made(points=[3])": "A point of the sweep is 3; give a mapping",
    f"{SWEEP}made(points=[{{4: 5}}])": "A point of the sweep is {4: 5}",
    f"{SWEEP}made(base=None)": "base of the sweep is None; give the path of a config file",
    f"{SWEEP}Sweep(base='', points=seeds(2))": "base of the sweep is ''",
    f"{SWEEP}Sweep(base='none.py', points=seeds(2))": "none.py' does not exist",
    f"{SWEEP}made(settings=3)": "settings of the sweep is 3",
    f"{SWEEP}made(settings={{'model': 3}})": "The sweep sets 'model', which the configuration does not have",
    f"{SWEEP}made(baseline=3)": "baseline of the sweep is 3",
    f"{SWEEP}made(baseline={{3: 4}})": "by which runs are not told apart|baseline of the sweep is",
    f"{SWEEP}made(bisection='lr')": "bisection of the sweep is 'lr'; give Bisection",
    f"{SWEEP}made(bisection='rule')": "bisection of the sweep is",
    f"{SWEEP}points('connection', 5)": "connection is 5; it must be a text",
    f"{SWEEP}points('optimizer.learning_rate', 10**400)": "learning_rate is 10+.*; a number must be at most",
    f"{SWEEP}points('model.width', 10**5000)": "model.width is a very large int; it must be at most",
    f"{SWEEP}points('train.seed', None)": "train.seed is None, a NoneType; it must be a int",
    f"{SWEEP}points('data.source', 'x' * 300)": "which has 30. bytes; at most 229",
    f"{SWEEP}Sweep(base='config.py', points=over('seed', 5))": "fails: Type(Check)?Error",
    f"{SWEEP}exit(3)": "fails: SystemExit: 3",
    f"{SWEEP}(1 / 0)": "ZeroDivisionError",
    f"{SWEEP}f()\ndef f(): return f()": "RecursionError",
    '"""Doc."""\nget_sweep = 5': "fails: Type(Check)?Error",
    "\0": "null bytes",
    '"""Doc."""\ndef get_config(): pass': r"has no get_sweep\(\)",
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_sweep_file_of_any_content_is_told_in_a_sentence(tmp_path, text):
    path = write_sweep(tmp_path)
    path.write_text(text)
    with pytest.raises(InputError, match=FILES[text]) as told:
        load_sweep(path)
    assert "\n" not in str(told.value)


def test_a_config_file_that_returns_something_else_is_told(tmp_path):
    path = write_sweep(tmp_path)
    (tmp_path / "config.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(InputError, match=r"get_config of 'config.py' returned a dict; it must return a ConfigDict"):
        load_sweep(path)


def test_a_connection_may_disable_a_part_without_brackets(tmp_path):
    (run,) = plan(base(tmp_path), [{"connection": "mhc", "model.connection.disable": "pre"}])
    assert run.config.model.connection.disable == ("pre",)


def told(function) -> bool:
    """Call a function, and return whether it succeeded.  Otherwise it must raise `InputError` with one line."""
    try:
        function()
    except InputError as error:
        text = str(error)
    else:
        return True
    assert "\n" not in text
    assert len(text) < 3000
    return False


KEYS = [
    *grid.flatten(to_mapping(ExperimentConfig())),
    "connection",
    "seed",
    "",
    "model",
    "model.connection",
    "a.b",
    "é" * 200,
]
VALUES = st.sampled_from(
    [None, float("nan"), math.inf, -0.0, 10**400, 2**63, -1, 0, 3, True, [], ["pre"], {}, b"x", 1j, object()]
)
VALUES |= st.text(max_size=8) | st.sampled_from(
    ["mhc", "hc:tanh=False", "mhc:t_max=" + "9" * 9, "\ud800", "a" * 300, "é" * 130]
)


@settings(max_examples=300)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), max_size=4))
@example([{"connection": "hc", "model.connection.t_max": 3}])
def test_any_points_make_a_grid_or_a_sentence(points):
    runs: list = []
    if not told(lambda: runs.extend(plan(to_mapping(ExperimentConfig()), points))):
        return
    assert len({run.name for run in runs}) == len(points)
    assert all(len(run.name.encode()) <= 240 and "/" not in run.name and run.name not in (".", "..") for run in runs)


@settings(max_examples=200)
@given(st.none() | st.integers() | st.text(max_size=3) | st.lists(VALUES, max_size=2), VALUES, VALUES, VALUES)
def test_any_fields_of_a_sweep_are_taken_or_refused_in_a_sentence(points, base_file, settings_, rule):
    rule_ = Bisection("a", 1.0)
    sweep = Sweep("a.py", [])
    fields = {"points": points, "base": base_file, "settings": settings_, "bisection": rule}
    for name, value in fields.items():
        object.__setattr__(rule_, "key", rule)
        for one in ({name: value}, fields, {"bisection": rule_}):
            wrong = Sweep("a.py", [])
            for key, other in one.items():
                object.__setattr__(wrong, key, other)
            told(lambda sweep=wrong: check_types(sweep))
    assert told(lambda: check_types(sweep)) is True


@pytest.mark.parametrize(
    "content",
    [{}, {"title": "t", "baseline": {}}, {"title": "t", "baseline": {}, "runs": 3}, {"title": "t", "runs": []}],
)
def test_a_sweep_json_without_its_entries_is_told(tmp_path, content):
    write_run(tmp_path, "run", "mhc")
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    for function in (read_plan, write_folder_report):
        with pytest.raises(
            InputError, match=r"sweep.json must hold a title, a baseline and a list of runs; the command"
        ):
            function(tmp_path)


def test_a_name_of_a_run_never_leaves_its_folder():
    assert run_name({"data.source": "../../etc"}) == "source..-..-etc"
    assert run_name({"connection": "/"}) == "base"


def test_the_longest_name_of_a_run_can_be_written(tmp_path):
    name = "a" * (LONGEST_NAME - ROOM)
    write_json(tmp_path / f"{name}.json", {})
    with pytest.raises(InputError, match="File name too long"):
        write_json(tmp_path / f"a{name}.json", {})
