"""The grid of a sweep: its points, names, configurations and mistakes, its plan on disk, and the sweeps that are shipped."""

import itertools
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.in_process import run_here
from support.tiny_runs import ROOT
from support.tiny_sweep import base, write_sweep

from mhc_jax import connections
from mhc_jax.analysis.run_reader import flatten
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError
from mhc_jax.reports.record import read_record
from mhc_jax.sweeps import grid
from mhc_jax.sweeps.grid import Grid, load_sweep, over, plan, product, read_plan, seeds, select, write_plan
from mhc_jax.sweeps.results import write_results


def test_product_zip_and_seeds():
    axes = product(over("connection", ["hc", "mhc"]), seeds(2))
    assert axes == [{"connection": c, "seed": s} for c in ("hc", "mhc") for s in (0, 1)]
    assert grid.zip_points(over("a", [1, 2]), over("b", [3, 4])) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(InputError, match="same length"):
        grid.zip_points(over("a", [1, 2]), over("b", [3]))
    with pytest.raises(InputError, match="both set seed"):
        product(seeds(2), seeds(3))


def test_names_are_readable_and_made_of_the_point_alone():
    assert grid.run_name({"optimizer.learning_rate": 0.01, "seed": 2, "connection": "mhc"}) == "mhc-lr0.01-seed2"
    assert grid.run_name({"connection": "mhc:disable=pre+post"}) == "mhc-disable-pre+post"
    assert grid.run_name({"model.num_layers": 4, "model.width": 8}) == "layers4-width8"
    assert grid.run_name({}) == "base"


def test_a_point_becomes_a_configuration(tmp_path):
    point = {"model.connection.t_max": 3, "connection": "mhc", "seed": 4, "optimizer.learning_rate": 1e-2}
    (run,) = plan(grid.applied(base(tmp_path), {"train.steps": 5, "seed": 9}), [point])
    assert (run.config.train.seed, run.config.data.seed, run.config.train.steps) == (4, 4, 5)
    assert to_mapping(run.config)["model"]["connection"]["t_max"] == 3
    assert run.config.optimizer.learning_rate == 1e-2


AXES = {
    "connection": ["residual", "hc", "mhc", "mhc:t_max=2"],
    "optimizer.learning_rate": [1e-3, 2e-3, 0.1, 1.0],
    "train.steps": [20, 21, 30],
    "model.width": [64, 128],
    "model.tied_embeddings": [False, True],
}


@settings(max_examples=25)
@given(st.data(), st.sets(st.sampled_from(sorted(AXES))), st.integers(0, 3))
def test_any_grid_has_every_point_once_under_names_of_its_own_and_is_read_back_from_disk(data, keys, k):
    drawn = {key: st.lists(st.sampled_from(AXES[key]), min_size=1, max_size=2, unique=True) for key in sorted(keys)}
    few = data.draw(st.fixed_dictionaries(drawn)) | ({"seed": list(range(k))} if k else {})
    points = product(*(over(key, values) for key, values in few.items()))
    runs = plan(to_mapping(ExperimentConfig()), points)
    assert len({run.name for run in runs}) == len(runs) == math.prod(map(len, few.values()))
    assert [tuple(run.point.values()) for run in runs] == list(itertools.product(*few.values()))
    for run in runs:
        found = flatten(to_mapping(run.config))
        assert all(found[key] == value for key, value in run.point.items() if "." in key)
        assert run.config.train.seed == run.config.data.seed == run.point.get("seed", 0)
    with tempfile.TemporaryDirectory() as folder:
        write_plan(Path(folder), Grid("title", runs))
        read = read_plan(Path(folder))
    assert {name: from_mapping(config) for name, config in read.items()} == {run.name: run.config for run in runs}


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([], "no points"),
        ([{"optimizer.learning_rat": 1.0}], "'optimizer.learning_rat', .* Did you mean 'optimizer.learning_rate'"),
        ([{"connection": "mch"}], "Did you mean 'mhc'"),
        ([{"connection": "residual", "model.connection.t_max": 3}], "'model.connection.t_max', which the config"),
        ([{"optimizer.learning_rate": -1.0}], r"Point \{optimizer.learning_rate: -1.0\}: .* must be above 0"),
        ([{"train.steps": "many"}], "it must be a int"),
        ([{"seed": 0}, {"seed": 0, "connection": "mhc"}], "are the same configuration"),
        ([{"data.tokenizer": "bpe:a/b"}, {"data.tokenizer": "bpe:a:b"}], "share the run folder 'tokenizerbpe-a-b'"),
    ],
)
def test_mistakes_in_a_grid_are_told_before_anything_runs(tmp_path, points, sentence):
    with pytest.raises(InputError, match=sentence):
        plan(base(tmp_path), points)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["FILE", "--config.train.step=4"], "The configuration has no key 'train.step'. Did you mean 'train.steps'?"),
        (["FILE", "--config.train.steps=many"], "--config.train.steps is 'many'; it must be of type int."),
        (["FILE", "--config.train.steps=0"], "train.steps is 0; it must be at least 1."),
        (["FILE", "--config=demo.py"], "--config=FILE has no use here"),
        (["FILE", "more"], "Unexpected argument 'more'"),
        (["none.py", "--config.train.steps=4"], "The file 'none.py' does not exist"),
        (["BROKEN"], "broken.py' fails: SyntaxError: '(' was never closed"),
        (["--config.train.steps=4"], "SWEEP.py is missing"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_sentence(tmp_path, arguments, sentence):
    file = str(write_sweep(tmp_path))
    (tmp_path / "broken.py").write_text("x = (")
    paths = {"FILE": file, "BROKEN": str(tmp_path / "broken.py")}
    words = [paths.get(word, word) for word in arguments]
    status, _, err = run_here("sweep", *words, f"--workdir={tmp_path / 'w'}")
    assert (status, err.count("\n")) == (2, 1)
    assert sentence in err
    assert not (tmp_path / "w").exists()


def test_sweep_files_that_cannot_be_used(tmp_path):
    path = write_sweep(tmp_path)
    assert load_sweep(path).title == "A tiny sweep"
    for text, sentence in (
        ("x = 1", "has no get_sweep"),
        ("def get_sweep(): pass", "has no docstring"),
        ('"""Doc."""\ndef get_sweep(): pass', "must return a Sweep, not a NoneType"),
        ("x = (", "fails: SyntaxError"),
        ('"""Doc."""\ndef get_sweep(): return 1 / 0', "fails: ZeroDivisionError"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            load_sweep(path)
    with pytest.raises(InputError, match="does not exist"):
        load_sweep(tmp_path / "none.py")


def test_the_command_line_edits_what_all_runs_share_and_points_win(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(grid, "plan", lambda *told: planned.append(plan(*told)) or planned[-1])
    path = write_sweep(tmp_path)
    path.write_text(path.read_text().replace("points=points", 'points=points, settings={"optimizer.grad_clip": 0}'))
    told = ["train.steps=50", "optimizer.grad_clip=0.5", "model.tied_embeddings=True", "train.seed=9"]
    told.append("train.trackers=tensorboard,wandb")
    status, out, _ = run_here("sweep", *(f"--config.{text}" for text in told), path, "--list")
    assert (status, len(out.splitlines())) == (0, 5)
    broken, *rest = [run.config for run in planned[0]]
    assert (broken.train.steps, broken.optimizer.grad_clip, broken.model.tied_embeddings) == (50, 0.5, True)
    assert broken.train.trackers == ("tensorboard", "wandb")
    assert [config.train.seed for config in (broken, *rest)] == [9, 0, 0, 1, 1]


def test_a_baseline_is_spelled_as_the_runs_are_and_one_that_no_point_is_is_refused(tmp_path):
    runs = plan(base(tmp_path), product(over("connection", ["hc", "mhc"]), over("optimizer.warmup_steps", [2, 3])))
    assert grid.canonical_baseline({"connection": "mhc"}, runs) == {"connection": "mhc:init=paper"}
    found = grid.canonical_baseline({"optimizer.warmup_steps": 2.0}, runs)
    assert json.dumps(found) == '{"optimizer.warmup_steps": 2}'
    for wrong, sentence in (
        ({"connection": "residual"}, "No point of the sweep is its baseline"),
        ({"optimizer.warmup_steps": 9}, "No point of the sweep is its baseline"),
        ({"optimizer.rate": 1}, "not told apart"),
        ({"model.connection.init": "home"}, "as a spec"),
        ({"connection": ["hc"]}, "give a mapping"),
        ("hc", "give a mapping"),
        (None, "give a mapping"),
    ):
        with pytest.raises(InputError, match=sentence):
            grid.canonical_baseline(wrong, runs)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid_say_their_command_and_make_the_recorded_connections_again(path):
    sweep = load_sweep(path)
    runs, text = sweep.runs, path.read_text()
    assert f"python experiments/sweep.py experiments/sweeps/{path.name} --workdir=runs/{path.stem}" in text
    # How many runs a bisection trains is known at its end.
    assert ("Cost: about" if sweep.bisection else f"Cost: {len(runs)} runs") in " ".join(text.split())
    assert len({run.config.train.seed for run in runs}) == {
        "ladder": 1,
        "one_gpu": 2,
        "overflow": 1,
        "second_wave": 5,
        "which_map": 8,
        "which_map_home": 8,
        "mixing_needed": 10,
        "residual_longer": 10,
        "muon_margin": 4,
        "muon_rates": 4,
    }.get(path.stem, 3)
    assert connections.spec(runs[0].config.model.connection) == sweep.baseline.get("connection", "residual")
    made = [to_mapping(run.config.model.connection) for run in runs]
    for run, connection in zip(runs, made, strict=True):
        assert ("init" in connection) == ("init=" in run.point.get("connection", "")), (
            "a sweep says which start it means"
        )
    for record in (ROOT / "experiments" / "records").glob(f"*-sweep-{path.stem}"):
        for recorded in (run.config["model"]["connection"] for run in read_record(record)):
            # A setting that came after the record has its default.
            assert to_mapping(connections.default_config(recorded["kind"])) | recorded in made


def test_the_sweep_of_the_tutorial_works_as_printed(tmp_path):
    (code,) = re.findall(
        r"```python\n(\"\"\"Two learning rates.*?)```", (ROOT / "docs/first_sweep.md").read_text(), re.DOTALL
    )
    shutil.copytree(ROOT / "experiments/configs", tmp_path / "configs")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.py").write_text(code)
    names = [run.name for run in load_sweep(tmp_path / "sweeps" / "mine.py").runs]
    assert len(names) == 12
    assert "mhc-t_max-5-lr0.01-seed2" in names


def test_select(tmp_path):
    runs = plan(base(tmp_path), seeds(5))
    parts = [[run.name for run in select(runs, f"{k}/2")] for k in (1, 2)]
    assert parts == [["seed0", "seed2", "seed4"], ["seed1", "seed3"]]
    assert select(runs, "") == runs
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(InputError, match="--select is"):
            select(runs, wrong)


def test_the_plan_keeps_runs_of_earlier_grids_that_were_begun(tmp_path):
    write_plan(tmp_path, Grid("title", plan(base(tmp_path), seeds(3))))
    (tmp_path / "seed2").mkdir()
    write_plan(tmp_path, Grid("title", plan(base(tmp_path), seeds(1))))
    assert list(read_plan(tmp_path)) == ["seed0", "seed2"]
    assert [row["status"] for row in write_results(tmp_path)] == ["pending", "pending"]
    with pytest.raises(InputError, match="no folder of a sweep"):
        read_plan(tmp_path / "seed2")
