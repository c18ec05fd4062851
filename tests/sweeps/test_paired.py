"""A comparison: what is done is not repeated, and every end gives a report."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from support.tiny_runs import lines, tiny, with_train, write_text

from mhc_jax import loop, paired
from mhc_jax.errors import InputError
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


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (["mhc", "mhc"], "'mhc' and 'mhc' are the same"),
        (["hc", "hc:num_streams=4"], "'hc' and 'hc:num_streams=4' are the same"),
        (["mch"], "connection.kind is 'mch'"),
        ([], "No connection is given"),
    ],
)
def test_plan_refuses(specs, sentence, base):
    with pytest.raises(InputError, match=sentence):
        paired.plan(base, specs)


def test_an_interrupted_comparison_goes_on_and_repeats_nothing(base, tmp_path, monkeypatch, capsys):
    runs = paired.plan(base, ["residual", "hc:num_streams=2"])
    read = loop._Run._read

    def reading(self, step, metrics):
        if self.label.startswith("hc") and step == 1:
            signal.raise_signal(signal.SIGINT)
        return read(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_read", reading)
        assert paired.run_all(runs, tmp_path / "demo", "t") == 130
    assert not (tmp_path / "demo" / "report.html").exists()
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "residual").rglob("*")}

    assert paired.run_all(runs, tmp_path / "demo", "t") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "residual").rglob("*")} == finished
    assert [e["event"] for e in lines(tmp_path / "demo" / "hc-num_streams-2", "event")] == ["interrupted", "resumed"]
    assert "residual has finished at step 3 already" in capsys.readouterr().out.replace(
        str(tmp_path / "demo") + "/", ""
    )
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()

    (tmp_path / "demo" / "report.html").unlink()  # killed between the last summary and the report
    assert paired.run_all(runs, tmp_path / "demo", "t") == 0
    assert (tmp_path / "demo" / "report.html").exists()

    longer = {name: with_train(config, steps=4) for name, config in runs.items()}
    first = {"new": with_train(base, seed=9), **longer}
    with pytest.raises(InputError, match=r"train.steps: 3 -> 4"):
        paired.run_all(first, tmp_path / "demo", "t")
    assert not (tmp_path / "demo" / "new").exists(), "the folders are checked before the first run starts"


def test_a_run_that_diverges_still_yields_a_report(base, tmp_path):
    runs = paired.plan(with_train(base, divergence_loss=1.0), ["residual"])
    assert paired.run_all(runs, tmp_path / "demo", "t") == 0
    assert json.loads((tmp_path / "demo" / "residual" / "summary.json").read_text())["status"] == "diverged"
    assert "diverged" in (tmp_path / "demo" / "report.html").read_text()


def test_branches_start_alike_and_see_the_same_text(base):
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=32))
    runs = paired.plan(base, ["residual", "hc:num_streams=2"])
    residual, hc = (jax.jit(lambda config=config: init_state(config))().params for config in runs.values())
    shared = {k: v for k, v in hc["layers"].items() if not k.endswith("_connection")}
    jax.tree.map(np.testing.assert_array_equal, residual["layers"], shared)
    np.testing.assert_array_equal(residual["embedding"], hc["embedding"])
    assert len({config.data for config in runs.values()}) == 1
