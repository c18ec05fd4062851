"""A comparison: what is done is not repeated, and every end gives a report."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
from support.tiny_runs import lines, tiny, with_train, write_text
from support.workers_here import workers_here

from mhc_jax.errors import InputError
from mhc_jax.runs.folder import read_json
from mhc_jax.sweeps import paired
from mhc_jax.train_step import init_state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return tiny(text, "residual", train={"steps": 3, "validate_every": 0, "checkpoint_every": 0})


def test_plan_changes_the_connection_and_the_seeds_alone(base):
    runs = paired.plan(base, ["residual", "mhc:num_streams=2"], seeds=2)
    assert list(runs) == ["residual-seed0", "residual-seed1", "mhc-num_streams-2-seed0", "mhc-num_streams-2-seed1"]
    assert runs["residual-seed0"] == base
    for k in range(2):
        one, other = runs[f"residual-seed{k}"], runs[f"mhc-num_streams-2-seed{k}"]
        assert one.train.seed == one.data.seed == k
        same = dataclasses.replace(other.model, connection=one.model.connection)
        assert dataclasses.replace(other, model=same) == one
    assert list(paired.plan(base, ["hc"])) == ["hc"]


def test_an_interrupted_comparison_goes_on_and_repeats_nothing(base, tmp_path, monkeypatch, capsys):
    runs, report = paired.plan(base, ["residual", "hc:dynamic=False"]), tmp_path / "report.html"
    with workers_here({"hc-dynamic-False": (1, signal.SIGINT)}):
        assert paired.run_all(runs, tmp_path, "t") == 130
    assert not report.exists()
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "residual").rglob("*")}

    with monkeypatch.context() as patch:
        patch.delattr(paired, "write_report")  # as if killed between the last summary and the report
        with pytest.raises(NameError, match="write_report"):
            paired.run_all(runs, tmp_path, "t")
    assert [e["event"] for e in lines(tmp_path / "hc-dynamic-False", "event")] == ["interrupted", "resumed"]
    assert paired.run_all(runs, tmp_path, "t") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "residual").rglob("*")} == finished
    assert f"{tmp_path}/residual has finished at step 3 already" in capsys.readouterr().out
    assert "<html" in report.read_text()

    longer = {name: with_train(config, steps=4) for name, config in runs.items()}
    with pytest.raises(InputError, match=r"train.steps: 3 -> 4"):
        paired.run_all({"new": with_train(base, seed=9), **longer}, tmp_path, "t")
    assert not (tmp_path / "new").exists(), "the folders are checked before the first run starts"


def test_a_run_that_diverges_still_yields_a_report(base, tmp_path):
    huge = dataclasses.replace(base, model=dataclasses.replace(base.model, embedding_init_std=1e30))
    runs = paired.plan(huge, ["residual"])
    assert paired.run_all(runs, tmp_path, "t") == 0
    assert read_json(tmp_path / "residual" / "summary.json")["status"] == "diverged"
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_branches_start_alike_and_see_the_same_text(base):
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=32))
    runs = paired.plan(base, ["residual", "hc:num_streams=2"])
    residual, hc = (jax.jit(lambda config=config: init_state(config))().params for config in runs.values())
    shared = {k: v for k, v in hc["layers"].items() if not k.endswith("_connection")}
    jax.tree.map(np.testing.assert_array_equal, residual["layers"], shared)
    np.testing.assert_array_equal(residual["embedding"], hc["embedding"])
    assert len({config.data for config in runs.values()}) == 1
