"""A comparison is a sweep of one axis: what is done is not repeated, and every end gives a report or says why not."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
from support.in_process import run_here
from support.tiny_runs import flags_of, lines, tiny, with_train, write_text
from support.workers_here import Worker, workers_here

from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.files.json_files import read_json
from mhc_jax.sweeps.grid import over, plan, read_plan
from mhc_jax.train_step import init_state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return tiny(text, "residual", train={"steps": 3, "validate_every": 0, "checkpoint_every": 0})


def compare(config, folder, connections, *more, at=None):
    """Exit status, standard output and standard error of a comparison whose runs are trained in this process."""
    with workers_here(at):
        return run_here("compare", *flags_of(config), f"--connections={connections}", f"--workdir={folder}", *more)


def test_runs_differ_in_the_connection_and_the_seeds_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "poll", lambda self: self.log.touch() or 2)  # no run is trained
    assert compare(base, tmp_path, "residual,mhc:num_streams=2", "--seeds=2")[0] == 1
    runs = {name: from_mapping(config) for name, config in read_plan(tmp_path).items()}
    names = ["residual-seed0", "residual-seed1", "mhc-num_streams-2-seed0", "mhc-num_streams-2-seed1"]
    assert list(runs) == names
    assert runs["residual-seed0"] == base
    for k in range(2):
        residual, mhc = runs[names[k]], runs[names[2 + k]]
        assert mhc.train.seed == mhc.data.seed == k
        same = dataclasses.replace(mhc.model, connection=residual.model.connection)
        assert dataclasses.replace(mhc, model=same) == residual
    two = dataclasses.replace(base, data=dataclasses.replace(base.data, seed=5))
    compare(two, tmp_path / "two", "hc", "--seeds=2")
    seeds = [(config["train"]["seed"], config["data"]["seed"]) for config in read_plan(tmp_path / "two").values()]
    assert seeds == [(0, 5), (1, 6)], "both count up from those of the config"


def test_a_comparison_goes_on_and_repeats_nothing(base, tmp_path):
    report, specs = tmp_path / "report.html", "residual,hc:dynamic=False"
    status, _, err = compare(base, tmp_path, specs, at={"hc-dynamic-False": (1, signal.SIGINT)})
    assert (status, report.exists()) == (1, False)
    assert "hc-dynamic-False failed (stopped by a signal from elsewhere; saved" in err
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "residual").rglob("*")}

    status, out, _ = compare(base, tmp_path, specs, "--title=Two kinds")
    assert status == 0
    assert [e["event"] for e in lines(tmp_path / "hc-dynamic-False", "event")] == ["interrupted", "resumed"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "residual").rglob("*")} == finished
    assert "| residual |" in out
    assert "| hc:dynamic=False |" in out
    assert out.endswith(f"Report: {report}\n")
    assert "<h1>Two kinds</h1>" in report.read_text()

    status, _, err = compare(with_train(base, steps=4), tmp_path, f"mhc,{specs}")
    assert status == 2
    assert "train.steps: 3 -> 4" in err
    assert not (tmp_path / "mhc-init-paper").exists(), "the folders are checked before the first run starts"


def test_a_run_that_diverges_still_yields_a_report_and_one_that_fails_says_why(base, tmp_path):
    overflowing = dataclasses.replace(base, model=dataclasses.replace(base.model, embedding_init_std=1e30))
    assert compare(overflowing, tmp_path, "residual")[0] == 0
    assert read_json(tmp_path / "residual" / "summary.json")["status"] == "diverged"
    assert "diverged" in (tmp_path / "report.html").read_text()

    broken = dataclasses.replace(base, model=dataclasses.replace(base.model, compute_dtype="float16"))
    status, _, err = compare(broken, tmp_path / "broken", "residual")
    assert status == 1
    assert "residual failed (exit status 2: error: model.compute_dtype is 'float16', which does not run on a CPU" in err


def test_branches_start_alike_and_see_the_same_text(base):
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=32))
    configs = [run.config for run in plan(to_mapping(base), over("connection", ["residual", "hc:num_streams=2"]))]
    residual, hc = (jax.jit(lambda config=config: init_state(config))().params for config in configs)
    shared = {k: v for k, v in hc["layers"].items() if not k.endswith("_connection")}
    jax.tree.map(np.testing.assert_array_equal, residual["layers"], shared)
    np.testing.assert_array_equal(residual["embedding"], hc["embedding"])
    assert len({config.data for config in configs}) == 1
