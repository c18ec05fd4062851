"""Spikes count once, no line of metrics is lost or doubled when a run goes on, and lines of progress say what is left."""

import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_runs import lines

from mhc_jax.errors import InputError
from mhc_jax.runs import progress
from mhc_jax.runs.metrics import MetricsWriter, SpikeDetector, plain


def fed(losses, window=4, threshold=0.5, state=None, start=1):
    detector = SpikeDetector(window, threshold, state)
    told = [step for step, loss in enumerate(losses, start) if detector.update(step, loss)]
    return detector, told


def test_a_spike_is_told_once_however_long_it_lasts():
    detector, told = fed([3.0, 3.0, 4.0, 4.5, 3.6, 3.0, 3.0, 9.0, 3.0, 9.0])
    assert told == detector.steps == [3, 8, 10]
    assert list(detector.recent) == [3.0, 3.0, 3.0, 3.0]


def test_the_threshold_is_above_the_median_and_exclusive():
    assert fed([3.0, 3.0, 3.5])[1] == []
    assert fed([3.0, 3.0, 3.5001])[1] == [3]
    assert fed([1.0, 1.0, 9.0, 9.0, 9.0, 1.4, 1.6])[1] == [3, 7], "spikes do not raise the median"
    # It judges after half a window.
    assert fed([3.0, 9.0, 3.0], window=6)[1] == []
    assert fed([3.0, 9.0], window=1)[1] == [2]
    # NaN is neither a spike nor remembered.
    detector, told = fed([3.0, 3.0, math.nan, 3.0, math.inf])
    assert told == [5]
    assert list(detector.recent) == [3.0, 3.0, 3.0]


def test_state_through_json_goes_on_exactly():
    losses = [3.0, 3.1, 9.0, 9.0, 3.0, 8.0, 3.2, 3.1, 7.0]
    for cut in range(len(losses)):
        half, told = fed(losses[:cut])
        rest, more = fed(losses[cut:], state=json.loads(json.dumps(half.state())), start=cut + 1)
        assert told + more == rest.steps == fed(losses)[1]
        assert rest.state() == fed(losses)[0].state()


def test_plain_values():
    value = {"nan": math.nan, "inf": np.float32(np.inf), "array": np.array([[1.0, math.nan]]), "tuple": (1, "a", None)}
    assert plain(value) == {"nan": None, "inf": None, "array": [[1.0, None]], "tuple": [1, "a", None]}
    assert plain(True) is True
    assert np.float32(plain(jnp.float32(0.1))) == np.float32(0.1), "9 digits are enough for a float32"
    assert plain([0.123456789, np.float32(16777215)]) == [0.123456789, 16777215.0], "and fewer are not"
    json.dumps(plain(value), allow_nan=False)


def write_steps(folder, keep_until, steps):
    writer = MetricsWriter(folder, keep_until)
    for step in steps:
        writer.write("train", step, {"loss": float(step)})
    writer.close()


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    write_steps(tmp_path, -1, [0, 1, 2, 3, 4])
    write_steps(tmp_path, 2, [3, 4, 5])
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    write_steps(tmp_path, -1, [0])
    assert [line["step"] for line in lines(tmp_path)] == [0], "a run that starts anew keeps nothing"


def test_a_changed_digit_of_an_earlier_line_is_told(tmp_path):
    with MetricsWriter(tmp_path, -1) as writer:
        for step in (1, 2):
            writer.write("train", step, {"loss": 2.5 + step})
        measured = writer.measured
        writer.write("event", 2, {"event": "interrupted"})
        writer.write("train", 3, {"loss": 2.5})
    with MetricsWriter(tmp_path, 2, measured=measured) as writer:
        assert (writer.remark, writer.measured) == ("", measured)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("3.5", "3.6"))
    with MetricsWriter(tmp_path, 2, measured=measured) as writer:
        assert writer.remark.startswith("metrics.jsonl is damaged: its lines of earlier steps are not those")


@pytest.mark.parametrize("half", ['{"kind": "train", "st', '{"kind": "train", "step": 1, "loss": 1.0}', "\0\0\0"])
def test_a_half_written_last_line_is_dropped_and_a_whole_one_kept(half, tmp_path):
    write_steps(tmp_path, -1, [0])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + half)
    write_steps(tmp_path, 5, [6])
    assert [line["step"] for line in lines(tmp_path)] == ([0, 1, 6] if half.endswith("}") else [0, 6])


def test_a_line_can_be_read_as_soon_as_it_is_written_and_a_full_disk_is_a_sentence(tmp_path):
    writer = MetricsWriter(tmp_path, -1)
    writer.write("train", 1, {"loss": math.nan})
    assert lines(tmp_path) == [{"kind": "train", "step": 1, "loss": None}]
    writer._file.close()
    with open("/dev/full", "w") as writer._file:  # every write fails with "No space left on device"
        with pytest.raises(InputError, match=r"Cannot write .*metrics.jsonl: No space left on device.*make room"):
            writer.write("train", 1, {"loss": 1.0})
        writer.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    fake = types.SimpleNamespace(now=100.0, monotonic=lambda: fake.now)
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_a_line_of_a_run_says_what_is_left_without_compilation(clock, capsys):
    """The first step ends after 90 s of compilation; the others take 2 s each, but for the last two."""
    shown = progress.Progress("run", "step", 10, done=3, every_s=3.0)
    told = []
    for steps, now in ((1, 190.0), (1, 192.0), (3, 198.0), (2, 199.0)):
        clock.now = now
        told.append(shown.advance(steps, "loss 2.3457"))
    assert told == [True, False, True, True]
    assert capsys.readouterr().err.splitlines() == [
        "run: step 4/10  loss 2.3457",
        "run: step 8/10  loss 2.3457  4 s left",
        "run: step 10/10  loss 2.3457  0 s left",
    ]


def test_a_process_that_is_not_the_first_shows_nothing(capsys):
    with progress.Progress("run", "step", 2, every_s=0.0, shown=False) as shown:
        shown.say("compiling")
        shown.advance(2)
    assert capsys.readouterr().err == ""


def test_a_line_of_a_sweep_says_what_is_left_at_the_pace_so_far(clock, tmp_path, capsys):
    """Two of four runs took 60 s side by side, which is 30 s a run, so that the other two take 60 s."""
    shown = progress.SweepProgress(tmp_path, dict.fromkeys("abcd", 8), 1)
    shown.started("a")
    shown.started("b")
    clock.now = 150.0
    shown.ended("a", "finished")
    clock.now = 160.0
    shown.ended("b", "failed")
    assert capsys.readouterr().err.splitlines()[2:] == [
        "a: finished after 50 s (2 of 5 runs done, about 0:02:30 left)",
        "b: failed after 60 s (2 of 5 runs done, about 60 s left)",
    ]


def test_work_of_unknown_length_tells_what_is_done_and_its_time(clock, capsys):
    with progress.Display("run", every_s=5.0) as shown:
        with shown.during("tokenizing") as update:
            for now, text in ((104.0, "1 MB"), (105.0, "2 MB"), (109.0, "3 MB")):
                clock.now = now
                update(text)
        with shown.during("compiling"):
            pass
    assert capsys.readouterr().err.splitlines() == [
        "run: tokenizing ...",
        "run: tokenizing: 2 MB, 5 s",
        "run: tokenizing took 9 s",
        "run: compiling ...",
    ]


def test_a_sweep_tells_what_each_run_does_from_its_log(clock, tmp_path, capsys):
    """Lines of an earlier process of the run, half-written ones and those of other programs do not count."""
    log = tmp_path / "logs" / "a.log"
    log.parent.mkdir()
    log.write_text("a: step 7/8  loss 1.0\n")
    shown = progress.SweepProgress(tmp_path, {"a": 8, "b": 8}, 0)
    shown.started("a")
    for more in (
        "Warning: slow ...\n",
        "a: compiling the train step ...\na: warning: odd text\n",
        "a: step 1/8  loss 5.25\n",
        "a: step 2/8  lo",
        "ss 4.5  3 s left\na: stopped\n",
    ):
        with log.open("a") as file:
            file.write(more)
        for _ in range(2):
            shown.update()
            clock.now += 31
    for more in ("a: step 3/8\n", "a: step 4/8\n"):
        with log.open("a") as file:
            file.write(more)
        shown.update()
        clock.now += 29
    assert progress.state_of(log, 0, "a") == ("step 4/8", 4)
    assert capsys.readouterr().err.splitlines() == [
        "a: started (1 waiting)",
        "a: compiling the train step",
        "a: step 1/8  loss 5.25",
        "a: step 2/8  loss 4.5  3 s left",
        "a: step 3/8",
    ], "a line every 30 s at most"
