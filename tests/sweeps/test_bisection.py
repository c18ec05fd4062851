"""The search for the largest stable value of a setting: which runs it trains, where it ends, and that it goes on after a stop."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_runs import write_text
from support.tiny_sweep import base

from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.sweeps import runner
from mhc_jax.sweeps.bisection import Bisection, bracket, lines, next_runs
from mhc_jax.sweeps.grid import Grid, load_sweep, over, plan, product, seeds, write_plan

RATE = "optimizer.learning_rate"
RATES = [1e-3 * 2**k for k in range(11)]
RULE = Bisection(RATE, loss_below=3.0)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two connections, two seeds and eleven learning rates, in an order that mixes them."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "text.txt")
    points = product(over(RATE, RATES[::-1]), over("connection", ["residual", "mhc"]), seeds(2))
    return Grid("title", plan(base(folder), points), bisection=RULE)


def largest(run):
    """The made-up largest stable rate of a run's line, different for each line.  One line has none."""
    return {"residual": [0.004, 0.0], "mhc": [0.03, 2.0]}[run.point["connection"]][run.point["seed"]]


def test_lines_are_sorted_and_hold_all_but_the_setting_fixed(grid):
    found = lines(grid.runs, RATE)
    assert [[run.point[RATE] for run in line] for line in found] == [RATES] * 4
    assert all(len({(run.point["connection"], run.point["seed"]) for run in line}) == 1 for line in found)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_a_search_ends_at_neighbours_after_logarithmically_many_runs(ends, data):
    """For any outcome that is stable below some value, the last stable and the first unstable one are found."""
    first = data.draw(st.integers(0, len(ends)))
    tried = {}
    for _ in range(len(ends) + 1):
        low, high = bracket(range(len(ends)), tried.get)
        if high - low == 1:
            break
        tried[(low + high) // 2] = (low + high) // 2 < first
    assert (low, high) == (first - 1, first)
    assert len(tried) <= len(ends).bit_length()


def test_rounds_train_the_middle_of_each_line_and_a_stopped_search_goes_on(grid, tmp_path, monkeypatch):
    calls = []

    def run_local(workdir, part, selected, workers):
        calls.append([run.name for run in selected])
        write_plan(workdir, part)
        assert {run.name for run in part.runs} == {*itertools.chain(*calls)}, "the plan is of the runs trained so far"
        for run in selected[: 1 if len(calls) == 2 else None]:
            (workdir / run.name).mkdir()
            stable = run.point[RATE] <= largest(run)
            summary = {"status": "finished", "validation_loss": 2.0 if stable else 3.0 + run.point["seed"]}
            write_json(
                workdir / run.name / "summary.json", summary if run.point["seed"] or stable else {"status": "diverged"}
            )
        return 130 if len(calls) == 2 else 0

    monkeypatch.setattr(runner, "run_local", run_local)
    assert runner.run_bisection(tmp_path, grid, 1) == 130
    assert not read_json(tmp_path / "sweep.json")["bisection"]["over"]
    assert runner.run_bisection(tmp_path, grid, 1) == 0
    assert len(calls[0]) == 4
    assert {run.point[RATE] for run in grid.runs if run.name in calls[0]} == {RATES[5]}
    assert {*calls[1][1:]} < {*calls[2]}, (
        "what the stop left undone is trained with the next round of the line that was not"
    )
    assert calls[-1] == []
    assert len({*itertools.chain(*calls)}) <= 4 * 4
    outcome = lambda run: (  # noqa: E731
        RULE.stable(s["status"], s.get("validation_loss"))
        if (file := tmp_path / run.name / "summary.json").is_file() and (s := read_json(file))
        else None
    )
    for line in lines(grid.runs, RATE):
        low, high = bracket(line, outcome)
        assert high == low + 1 == sum(run.point[RATE] <= largest(run) for run in line)
    assert next_runs(grid.runs, RULE, outcome) == []
    assert read_json(tmp_path / "sweep.json")["bisection"]["over"]


def test_a_failed_run_leaves_its_line_out_and_the_others_go_on(grid, tmp_path, monkeypatch):
    calls = []

    def run_local(workdir, part, selected, workers):
        write_plan(workdir, part)
        calls.append(selected)
        failing = [run for run in selected if run.name.startswith("residual") and run.name.endswith("seed0")]
        for run in selected:
            if run not in failing:
                (workdir / run.name).mkdir()
                loss = 2.0 if run.point[RATE] <= largest(run) else 3.5
                write_json(workdir / run.name / "summary.json", {"status": "finished", "validation_loss": loss})
        return 1 if failing else 0

    monkeypatch.setattr(runner, "run_local", run_local)
    assert runner.run_bisection(tmp_path, grid, 1) == 1
    assert [len(selected) for selected in calls[:2]] == [4, 3]
    assert not read_json(tmp_path / "sweep.json")["bisection"]["over"]


def test_a_point_without_the_setting_is_refused(grid, tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        f'"""Title."""\nfrom mhc_jax.sweeps.bisection import Bisection\nfrom mhc_jax.sweeps.grid import Sweep, seeds\n'
        f'def get_sweep():\n    return Sweep("base.py", seeds(2), bisection=Bisection("{RATE}", 3.0))\n'
    )
    (tmp_path / "base.py").write_text(
        "from ml_collections import ConfigDict\nfrom mhc_jax.config import ExperimentConfig\n"
        "from mhc_jax.config.mapping import to_mapping\ndef get_config():\n    return ConfigDict(to_mapping(ExperimentConfig()))\n"
    )
    with pytest.raises(
        InputError, match=f"searches '{RATE}', and the point of run 'seed0' sets it to None: let every point"
    ):
        load_sweep(file)
