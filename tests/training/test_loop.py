"""Training: a run that is stopped and goes on ends bitwise like one that is not; every end leaves a usable folder."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from support import stress_kill
from support.ends import Killed, Poisoned, kill_at, poisoned, stop_at
from support.tiny_runs import (
    assert_same_run,
    data_of,
    final_state,
    flags_of,
    lines,
    measured,
    run_script,
    script,
    tiny,
    with_train,
    write_text,
)

from mhc_jax import loop
from mhc_jax.checkpoint import load_params
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.mapping import to_mapping
from mhc_jax.train_step import init_state, make_train_step


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def residual(text):
    return tiny(text, "residual", train={"diagnostics_every": 8})


@pytest.fixture(scope="module")
def alone(residual, tmp_path_factory):
    """A finished run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(residual, folder)
    return folder


def test_a_finished_run_is_recorded_and_not_repeated(residual, alone, capsys):
    train_lines = lines(alone, "train")
    assert [line["step"] for line in train_lines] == list(range(1, 9))
    assert [line["tokens"] for line in train_lines] == [64 * step for step in range(1, 9)]
    assert [line["step"] for line in lines(alone, "validation")] == [4, 8]
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 8
    assert summary["validation_loss"] == pytest.approx(lines(alone, "validation")[-1]["loss"], rel=1e-8)
    mean = np.mean([line["loss"] for line in train_lines])
    assert summary["train_loss"] == pytest.approx(mean, rel=1e-8)
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*")}
    assert train(residual, alone, label="again") == summary
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*")} == before
    assert "finished at step 8 already; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["residual", "mhc:num_streams=2:t_max=2"])
def test_stop_and_go_on_is_bitwise_one_run(kind, text, alone, tmp_path, monkeypatch):
    config = tiny(text, kind, train={"diagnostics_every": 8 if kind == "residual" else 0})
    if kind != "residual":
        alone = tmp_path / "alone"
        train(config, alone)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        stopped = train(config, tmp_path / "run")
    # The metrics of step 4 are read before step 5 is dispatched, because step 4 validates.
    assert stopped["status"] == "interrupted"
    assert stopped["steps"] in (4, 5)
    assert train(config, tmp_path / "run")["status"] == "finished"
    assert_same_run(alone, tmp_path / "run")
    events = [(line["event"], line["step"]) for line in lines(tmp_path / "run", "event")]
    assert events == [("interrupted", stopped["steps"]), ("resumed", stopped["steps"])]


def test_stop_before_the_first_step(residual, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        enter = loop.StopRequest.__enter__

        def entering(self):
            enter(self)
            signal.raise_signal(signal.SIGINT)
            return self

        patch.setattr(loop.StopRequest, "__enter__", entering)
        stopped = train(residual, tmp_path / "run")
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 0)
    train(residual, tmp_path / "run")
    assert_same_run(alone, tmp_path / "run")


def test_a_second_signal_acts_as_usual(usual_sigint):
    with loop.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_killed_between_steps_goes_on_from_the_checkpoint(residual, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_read", lambda self, step, metrics: step == 5)
        with pytest.raises(Killed):
            train(residual, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert max(line["step"] for line in lines(tmp_path / "run")) == 4
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 5, "lo')
    train(residual, tmp_path / "run")
    assert [(e["event"], e["step"]) for e in lines(tmp_path / "run", "event")] == [("resumed", 3)]
    assert_same_run(alone, tmp_path / "run")


def test_killed_before_the_first_checkpoint_starts_anew(residual, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_read", lambda self, step, metrics: step == 2)
        with pytest.raises(Killed):
            train(residual, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    train(residual, tmp_path / "run")
    assert_same_run(alone, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_killed_between_the_last_checkpoint_and_the_summary(residual, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, loop, "write_json", lambda path, value: path.name == "summary.json")
        kill_at(patch, loop._Run, "_summary", lambda self, status: True)
        with pytest.raises(Killed):
            train(residual, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_compile", lambda *args: True)  # nothing is left to compile for
        assert train(residual, tmp_path / "run")["status"] == "finished"
    assert_same_run(alone, tmp_path / "run")


def assert_usable(folder):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_state(folder)))
    _, params = load_params(folder)
    assert params["embedding"].shape[1] == 16


def test_nan_stops_the_run_and_leaves_finite_parameters(residual, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    summary = train(residual, folder, data=poisoned(residual))
    assert (summary["status"], summary["first_nonfinite_step"]) == ("diverged", 6)
    assert lines(folder, "train")[-1]["loss"] is None
    assert [(e["event"], e["step"]) for e in lines(folder, "event")] == [("diverged", 6)]
    assert "diverged at step 6" in capsys.readouterr().err
    assert_usable(folder)
    assert train(residual, folder) == summary, "a diverged run has ended"

    (folder / "summary.json").unlink()  # killed before it was written
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_compile", lambda *args: True)
        again = train(residual, folder, data=poisoned(residual))
    assert [again[k] for k in ("status", "steps", "first_nonfinite_step")] == ["diverged", summary["steps"], 6]


def test_nan_from_the_first_step(residual, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "first", 1)
    monkeypatch.setattr(Poisoned, "last", 99)
    summary = train(residual, tmp_path / "run", data=poisoned(residual))
    assert (summary["status"], summary["steps"], summary["train_loss"]) == ("diverged", 0, None)
    assert_usable(tmp_path / "run")


def test_divergence_loss(residual, tmp_path):
    config = with_train(residual, divergence_loss=1.0)
    summary = train(config, tmp_path / "run")
    assert summary["status"] == "diverged"
    assert summary["first_nonfinite_step"] is None
    assert [(e["event"], e["step"]) for e in lines(tmp_path / "run", "event")] == [("diverged", 1)]
    assert_usable(tmp_path / "run")


@pytest.mark.slow
def test_float16_that_overflows_diverges(text, tmp_path):
    half = {"stream_dtype": "float16"}
    config = tiny(text, "hc:num_streams=2", model=half, optimizer={"learning_rate": 1e4}, train={"steps": 40})
    summary = train(config, tmp_path / "run")
    assert summary["status"] == "diverged"
    assert summary["first_nonfinite_step"] <= 40
    assert_usable(tmp_path / "run")


def test_diagnostics_change_no_loss_and_not_the_train_step(text, tmp_path):
    base = tiny(text, "hc:num_streams=2", train={"steps": 4})
    hlo = []
    for every in (0, 2):
        config = with_train(base, diagnostics_every=every)
        train(config, tmp_path / str(every))
        config = loop.resolve_vocabulary(config, data_of(config))
        state = jax.eval_shape(lambda config=config: init_state(config))
        batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((4, 16), "int32"))
        hlo.append(jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).as_text())
    assert hlo[0] == hlo[1]
    for kind in ("train", "validation"):
        assert lines(tmp_path / "0", kind) == lines(tmp_path / "2", kind)
    diagnostics = lines(tmp_path / "2", "diagnostics")
    assert [line["step"] for line in diagnostics] == [0, 2, 4]
    assert lines(tmp_path / "0", "diagnostics") == []
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "0"), final_state(tmp_path / "2"))
    off, on = (json.loads((tmp_path / every / "summary.json").read_text()) for every in ("0", "2"))
    for key in STREAM_MEASURES:
        assert off[f"final_{key}"] is None
        assert on[f"final_{key}"] == pytest.approx(np.mean(diagnostics[-1][key]), rel=1e-8)


def test_streams_too_large_to_measure_are_null_and_end_no_run(text, tmp_path, monkeypatch):
    """Training stays finite where the held-out sequence of the diagnostics overflows."""
    real = loop.summarize
    broken = {key: np.array([1.0, np.nan]) for key in STREAM_MEASURES}
    monkeypatch.setattr(loop, "summarize", lambda collected: real(collected) | broken)
    summary = train(tiny(text, "residual", train={"steps": 2, "diagnostics_every": 2}), tmp_path / "run")
    assert summary["status"] == "finished"
    assert [summary[f"final_{key}"] for key in STREAM_MEASURES] == [None] * 3


def test_the_last_step_is_validated_diagnosed_and_saved_whatever_the_intervals(text, tmp_path):
    never = {"steps": 3, "validate_every": 0, "checkpoint_every": 0, "diagnostics_every": 100, "log_every": 100}
    config = tiny(text, "residual", train={**never, "tensorboard": True})
    folder = tmp_path / "run"
    summary = train(config, folder)
    steps = {kind: [line["step"] for line in lines(folder, kind)] for kind in ("train", "validation", "diagnostics")}
    assert steps == {"train": [3], "validation": [3], "diagnostics": [0, 3]}
    assert summary["validation_loss"] is not None
    assert [p.name for p in (folder / "checkpoints").glob("[0-9]*")] == ["3"]
    assert tensorboard_scalars(folder)["validation/loss", 3] == pytest.approx(summary["validation_loss"], rel=1e-6)


def tensorboard_scalars(folder):
    """(tag, step) -> value of the only event file."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (folder / "tensorboard").glob("events.*")
    data, out = file.read_bytes(), {}
    while data:  # a record: length (8 bytes), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        out |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script(number, residual, tmp_path):
    config = with_train(residual, steps=800, checkpoint_every=0, validate_every=0)
    command = [*flags_of(config), f"--workdir={tmp_path / 'run'}"]
    process = script("train", *command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    summary = json.loads(out)
    assert summary["status"] == "interrupted"
    said = [line for line in err.splitlines() if "stopped" in line]
    assert said == [
        f"run: stopped by signal {int(number)} after step {summary['steps']}; saved. Run the same command to go on."
    ]
    assert "Traceback" not in err
    assert (
        int(final_state(tmp_path / "run")["step"])
        == summary["steps"]
        == max(s["step"] for s in measured(tmp_path / "run"))
    )
    if number == signal.SIGTERM:
        status, _, err = run_script("train", *command)
        assert status == 0, err
        train(config, tmp_path / "alone")
        assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_a_folder_that_cannot_be_used_is_told_before_anything_is_written(residual, alone, tmp_path):
    with pytest.raises(InputError, match=r"another configuration \(train.seed: 0 -> 1; train.steps: 8 -> 9\)"):
        train(with_train(residual, seed=1, steps=9), alone)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not a run folder"):
        train(residual, notes)
    assert [p.name for p in notes.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="is not a run folder"):
        train(residual, notes / "mine.txt")
    with pytest.raises(InputError, match=r"Cannot create .*: Not a directory"):
        train(residual, notes / "mine.txt" / "run")


@pytest.mark.parametrize("broken", ["{", "[]", ""])
def test_damaged_json_is_a_sentence(broken, residual, alone, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(broken)
    with pytest.raises(InputError, match=r"config.json"):
        train(residual, folder)
    (folder / "config.json").write_text((alone / "config.json").read_text())
    (folder / "summary.json").write_text(broken)
    with pytest.raises(InputError, match=r"summary.json"):
        train(residual, folder)


def test_a_kill_while_config_json_was_written_does_not_lock_the_folder(residual, tmp_path):
    (tmp_path / "config.tmp").write_text("{")
    assert loop.check_run_folder(tmp_path, to_mapping(residual)) is None


def test_a_writer_that_is_not_installed_is_named_before_the_folder_is_made(residual, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(InputError, match=rf"train.{name} is on.*pip install"):
            train(with_train(residual, **{name: True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_too_small_is_refused(text, tmp_path):
    with pytest.raises(InputError, match=r"model.vocab_size is 5, but the tokenizer has \d+ tokens"):
        train(tiny(text, "residual", model={"vocab_size": 5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float16_branches_on_a_cpu_are_refused_and_bfloat16_runs(text, tmp_path):
    with pytest.raises(InputError, match=r"model.compute_dtype is 'float16', which does not run on a CPU"):
        train(tiny(text, "residual", model={"compute_dtype": "float16"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    half = {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}
    config = tiny(text, "residual", model=half, optimizer={"warmup_steps": 0}, train={"steps": 1})
    assert train(config, tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    assert stress_kill.stress(tmp_path, kills=3).startswith("3 kills")
