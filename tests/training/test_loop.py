"""A run that is stopped and goes on ends bitwise like one that is not, and every end leaves a usable folder."""

import json
import os
import re
import signal
import threading
import types

import jax
import numpy as np
import pytest
from support.ends import Poisoned, at_read_of, kill_at, poisoned, stop_at, train_until_killed
from support.tiny_runs import assert_same_run, at_step, final_state, flags_of, lines, run_script, tiny, with_train
from support.tracker_files import tensorboard

from mhc_jax import loop
from mhc_jax.config.mapping import to_mapping
from mhc_jax.cost import counts
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.runs import history, stop
from mhc_jax.runs.checkpoint import load_params


def events(folder):
    return [(line["event"], line["step"]) for line in lines(folder, "event") if line["event"] != "spike"]


def read(folder, name="summary"):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_finished_run_is_recorded_and_not_repeated(residual, alone, capsys):
    assert [(line["step"], line["tokens"]) for line in lines(alone, "train")] == [
        (step, 64 * step) for step in range(1, 9)
    ]
    assert [line["step"] for line in lines(alone, "validation")] == [4, 8]
    summary = read(alone)
    assert (summary["status"], summary["steps"], summary["spike_steps"]) == ("finished", 8, [])
    env = read(alone, "env")
    assert {"date", "commit", "dirty", "python", "device", "packages", "data"} <= set(env)
    assert env["packages"]["jax"]
    assert env["data"]["source"] == residual.data.source
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*")}
    assert train(residual, alone, label="again") == summary
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*")} == before
    assert "finished at step 8 already; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["residual", "mhc:num_streams=2:t_max=2"])
def test_stop_and_go_on_is_bitwise_one_run(kind, text, residual, alone, tmp_path, monkeypatch):
    config = residual if kind == "residual" else tiny(text, kind)
    if kind != "residual":
        alone = tmp_path / "alone"
        train(config, alone)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        stopped = train(config, tmp_path / "run")
    # The metrics of step 4 are read before step 5 is dispatched, because step 4 validates.
    assert stopped["steps"] in (4, 5)
    summary = train(config, tmp_path / "run")
    assert (stopped["status"], summary["status"]) == ("interrupted", "finished")
    assert_same_run(alone, tmp_path / "run")
    assert events(tmp_path / "run") == [("interrupted", stopped["steps"]), ("resumed", stopped["steps"])]
    times = [line["step_time_s"] for line in lines(tmp_path / "run", "train", times=True)]
    assert summary["train_s"] == pytest.approx(sum(times), rel=1e-6), "of all steps, also those before the stop"


def test_a_run_that_goes_on_remembers_its_spikes(residual, tmp_path, monkeypatch):
    """With a window of four losses, in which the jump at step 4 is a spike."""
    monkeypatch.setattr(history, "SPIKE_WINDOW", 4)
    train(residual, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        train(residual, tmp_path / "run")
    train(residual, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert read(tmp_path / "run")["spike_steps"] == [4]
    assert ("spike", 4) in [(line["event"], line["step"]) for line in lines(tmp_path / "run", "event")]


def test_stop_before_the_first_step(residual, alone, tmp_path, monkeypatch):
    class Stopped(loop.StopRequest):
        def __enter__(self):
            super().__enter__()
            signal.raise_signal(signal.SIGINT)
            return self

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", Stopped)
        stopped = train(residual, tmp_path / "run")
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 0)
    train(residual, tmp_path / "run")
    assert_same_run(alone, tmp_path / "run")


def test_a_process_ends_although_a_thread_of_a_failed_save_waits(monkeypatch, capsys):
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", statuses.append)
    waiting = type("Future", (threading.Thread,), {"__module__": "orbax.checkpoint.futures"})(target=ended.wait)
    stop.exit_if_a_save_hangs(2)
    waiting.start()
    stop.exit_if_a_save_hangs(2)
    stop.exit_if_a_save_hangs(1, RuntimeError("the cause"))
    ended.set()
    waiting.join()
    stop.exit_if_a_save_hangs(3)
    assert statuses == [2, 1]
    assert "RuntimeError: the cause" in capsys.readouterr().err


def test_a_second_signal_acts_as_usual(usual_sigint):
    told = []
    with loop.StopRequest(told.append) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert told == ["stopping as soon as all is saved; a second Ctrl-C ends at once, without saving"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("at", "resumed"), [(5, [("resumed", 3)]), (2, [])])
def test_killed_between_steps_goes_on_from_the_checkpoint_or_starts_anew(at, resumed, residual, alone, tmp_path):
    folder = tmp_path / "run"
    train_until_killed(residual, folder, "read", at_read_of(at))
    assert max(line["step"] for line in lines(folder)) == at - 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')
    (folder / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    train(residual, folder)
    assert events(folder) == resumed
    assert_same_run(alone, folder)
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_killed_between_the_last_checkpoint_and_the_summary(residual, alone, tmp_path, monkeypatch):
    train_until_killed(residual, tmp_path / "run", "summary_of")
    kill_at(monkeypatch, "compile_programs")  # nothing is left to compile for
    assert train(residual, tmp_path / "run")["status"] == "finished"
    assert_same_run(alone, tmp_path / "run")


def assert_usable(folder):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_state(folder)))
    assert load_params(folder)[1]["embedding"].shape[1] == 16


def test_nan_stops_the_run_and_leaves_finite_parameters(residual, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    summary = train(residual, folder, data=poisoned(residual))
    assert (summary["status"], summary["first_nonfinite_step"]) == ("diverged", 6)
    assert lines(folder, "train")[-1]["loss"] is None
    assert events(folder) == [("diverged", 6)]
    assert "diverged at step 6" in capsys.readouterr().err
    assert_usable(folder)
    assert train(residual, folder) == summary, "a diverged run has ended"

    (folder / "summary.json").unlink()  # killed before it was written
    kill_at(monkeypatch, "compile_programs")
    again = train(residual, folder, data=poisoned(residual))
    assert [again[k] for k in ("status", "steps", "first_nonfinite_step")] == ["diverged", summary["steps"], 6]


def test_a_divergence_right_behind_a_checkpoint_is_saved_with_it(residual, tmp_path, monkeypatch):
    """The state of step 6 is saved before step 7 diverges, which changes no state."""
    monkeypatch.setattr(Poisoned, "first", 7)
    monkeypatch.setattr(Poisoned, "last", 99)
    folder = tmp_path / "run"
    summary = train(residual, folder, data=poisoned(residual))
    assert [summary[k] for k in ("status", "steps", "first_nonfinite_step")] == ["diverged", 6, 7]
    (folder / "summary.json").unlink()  # killed before it was written
    kill_at(monkeypatch, "compile_programs")
    again = train(residual, folder, data=poisoned(residual))
    assert [again[k] for k in ("status", "steps", "first_nonfinite_step")] == ["diverged", 6, 7]


def test_divergence_at_the_first_step(residual, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "first", 1)
    monkeypatch.setattr(Poisoned, "last", 99)
    summary = train(residual, tmp_path / "run", data=poisoned(residual))
    assert (summary["status"], summary["first_nonfinite_step"]) == ("diverged", 1)
    assert (summary["steps"], summary["train_loss"]) == (0, None)
    assert events(tmp_path / "run") == [("diverged", 1)]
    assert_usable(tmp_path / "run")


@pytest.mark.slow
def test_float16_that_overflows_diverges(text, tmp_path):
    half = {"stream_dtype": "float16"}
    config = tiny(text, "hc:num_streams=2", model=half, optimizer={"learning_rate": 1e4}, train={"steps": 40})
    summary = train(config, tmp_path / "run")
    assert (summary["status"], summary["first_nonfinite_step"] <= 40) == ("diverged", True)
    assert_usable(tmp_path / "run")


def test_diagnostics_change_no_loss_and_not_the_train_step(text, tmp_path, monkeypatch):
    traced, count = {}, counts.jaxpr_flops

    def keeping(jaxpr):  # the whole step first, then the programs that it calls
        traced.setdefault(every, re.sub("0x[0-9a-f]+", "", str(jaxpr)))
        return count(jaxpr)

    monkeypatch.setattr(counts, "jaxpr_flops", keeping)
    for every in (0, 1):
        settings = {"steps": 2, "validate_every": 2, "diagnostics_every": every}
        train(tiny(text, "hc:num_streams=2", train=settings), tmp_path / str(every))
    assert traced[0] == traced[1]
    for kind in ("train", "validation"):
        assert lines(tmp_path / "0", kind) == lines(tmp_path / "1", kind)
    none, diagnostics = (lines(tmp_path / every, "diagnostics") for every in ("0", "1"))
    assert (none, [line["step"] for line in diagnostics]) == ([], [0, 1, 2])
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "0"), final_state(tmp_path / "1"))


def test_streams_too_large_to_measure_are_null_and_end_no_run(residual, tmp_path, monkeypatch):
    """Training stays finite where the held-out sequence of the diagnostics overflows."""
    real, broken = loop.summarize, dict.fromkeys(STREAM_MEASURES, np.array([1.0, np.nan]))
    monkeypatch.setattr(loop, "summarize", lambda collected: real(collected) | broken)
    summary = train(residual, tmp_path / "run")
    assert [summary[k] for k in ("status", *(f"final_{key}" for key in broken))] == ["finished", None, None, None]


def test_pauses_are_no_part_of_a_step_and_counted_once(residual, tmp_path, monkeypatch):
    """The clock moves by 1 s while a step is waited for, by 100 s in a save and by 1000 s in diagnostics."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(history, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(owner, name, seconds):
        real = getattr(owner, name)

        def slower(*args):
            clock.now += seconds
            return real(*args)

        monkeypatch.setattr(owner, name, slower)

    for of_one in ((loop, "read", 1), (loop.Checkpoints, "save", 100), (loop, "summarize", 1000)):
        slow(*of_one)
    summary = train(residual, tmp_path / "run")
    assert [line["step_time_s"] for line in lines(tmp_path / "run", "train", times=True)] == [1.0] * 8
    expected = {"train_s": 8, "checkpoint_s": 300, "diagnostics_s": 2000, "wall_clock_s": 2308}  # saved at 3, 6 and 8
    assert summary | expected == summary


def test_the_last_step_is_validated_diagnosed_and_saved_whatever_the_intervals(text, tmp_path):
    never = {"steps": 3, "validate_every": 0, "checkpoint_every": 0, "diagnostics_every": 100, "log_every": 100}
    folder = tmp_path / "run"
    config = tiny(text, "mhc:num_streams=2:t_max=1", train={**never, "trackers": ("tensorboard",)})
    summary = train(config, folder)
    steps = {kind: [line["step"] for line in lines(folder, kind)] for kind in ("train", "validation", "diagnostics")}
    assert steps == {"train": [3], "validation": [3], "diagnostics": [0, 3]}
    assert [p.name for p in (folder / "checkpoints").glob("[0-9]*")] == ["3"]
    shown = tensorboard(folder)
    assert shown.scalars["validation/loss"] == {3: np.float32(summary["validation_loss"])}
    for side in ("forward", "backward"):
        gains = {line["step"]: line[f"composite_{side}"] for line in lines(folder, "diagnostics")}
        assert shown.scalars[f"diagnostics/max_composite_{side}"] == {s: np.float32(max(g)) for s, g in gains.items()}
        assert shown.histograms[f"diagnostics/composite_{side}"][3].num == 2


def interrupted_script(config, folder, number):
    """experiments/train.py with the flags of `config`, which at step 4 sends itself a signal."""
    env = {"XLA_FLAGS": os.environ["XLA_FLAGS"], **at_step({folder.name: (4, number, "self")})}
    status, out, err = run_script("train", *flags_of(config), f"--workdir={folder}", env=env)
    assert status == 130, err
    summary = json.loads(out)
    assert summary["status"] == "interrupted"
    by, end = "Ctrl-C" if number == signal.SIGINT else "SIGTERM", f"after step {summary['steps']}; saved. Run the same"
    told = [f"run: stopped{by} {end} command to go on." for by in (f" by {by}", "")]
    assert [line for line in err.splitlines() if "stopped" in line] == told
    assert err.splitlines()[-1] == told[-1], "what to do stands behind the summary"
    assert all(line.startswith("run: ") for line in err.splitlines()), err
    assert read(folder, "config") == to_mapping(config), "flags that spell out a configuration give exactly that one"
    assert int(final_state(folder)["step"]) == summary["steps"] == max(line["step"] for line in lines(folder))


def test_a_signal_to_the_script(residual, alone, tmp_path):
    """A run that a script began goes on in this process, since the flags give the same configuration."""
    interrupted_script(residual, tmp_path / "run", signal.SIGTERM)
    assert train(residual, tmp_path / "run")["status"] == "finished"
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.full
def test_ctrl_c_in_the_script_and_the_same_command_again(residual, alone, tmp_path):
    interrupted_script(residual, tmp_path / "run", signal.SIGINT)
    command = ["train", *flags_of(residual), f"--workdir={tmp_path / 'run'}"]
    status, _, err = run_script(*command, env={"XLA_FLAGS": os.environ["XLA_FLAGS"]})
    assert status == 0, err
    assert_same_run(alone, tmp_path / "run")
    status, out, err = run_script(*command)
    assert (status, err, "nothing to do" in out) == (0, "", True), "a run that has ended is not repeated"


def test_a_folder_that_cannot_be_used_is_told_before_anything_is_written(residual, alone, tmp_path):
    with pytest.raises(InputError, match=r"another configuration \(train.seed: 0 -> 1; train.steps: 8 -> 9\)"):
        train(with_train(residual, seed=1, steps=9), alone)
    with pytest.raises(InputError, match=r"train.steps: 8 -> 9\); .* docs/warm_start.md \(More steps\)"):
        train(with_train(residual, steps=9), alone)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep")
    for folder in (notes, notes / "mine.txt"):
        with pytest.raises(InputError, match="is not a run folder"):
            train(residual, folder)
    assert [p.name for p in notes.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match=r"Cannot create .*: Not a directory"):
        train(residual, notes / "mine.txt" / "run")


@pytest.mark.parametrize("broken", ["{", "[]", ""])
def test_damaged_json_is_a_sentence(broken, residual, tmp_path):
    (tmp_path / "0123.tmp").write_text(broken)  # killed while config.json was written
    assert loop.check_run_folder(tmp_path, to_mapping(residual)) is None
    (tmp_path / "config.json").write_text(broken)
    with pytest.raises(InputError, match=r"config\.json"):
        train(residual, tmp_path)


def test_what_cannot_be_trained_is_refused_before_the_folder_is_made(text, residual, tmp_path, monkeypatch):
    def refused(config, why):
        with pytest.raises(InputError, match=why):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(tiny(text, "residual", model={"vocab_size": 5}), r"vocab_size is 5, but the tokenizer has \d+ tokens")
    half = tiny(text, "residual", model={"compute_dtype": "float16"})
    refused(half, r"model.compute_dtype is 'float16', which does not run on a CPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        told = rf"train.trackers has '{name}', but {package} is missing: pip install {package}"
        refused(with_train(residual, trackers=(name,)), told)


def test_bfloat16_branches_run_on_a_cpu(text, tmp_path):
    half = {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}
    config = tiny(text, "residual", model=half, optimizer={"warmup_steps": 0}, train={"steps": 1})
    assert train(config, tmp_path / "run")["status"] == "finished"
