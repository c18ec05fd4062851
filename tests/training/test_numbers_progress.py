"""The numbers that are printed while something runs are right, on a clock that is set by hand."""

import types

import pytest

from mhc_jax import progress


@pytest.fixture
def clock(monkeypatch):
    own = types.SimpleNamespace(now=100.0, monotonic=lambda: own.now)
    monkeypatch.setattr(progress, "time", own)
    return own


def test_a_line_of_a_run_says_what_is_left_without_compilation(clock, capsys):
    """Compilation takes 90 s, of which the first step waits for 60; then a step takes 2 s."""
    shown = progress.RunProgress("run", 10, start=3, every_s=0.0)
    for step, now in ((4, 190.0), (5, 192.0), (8, 198.0), (10, 202.0)):
        clock.now = now
        shown.update(step, 2.34567, 12345.6)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "run: step 4/10  loss 2.3457  12,346 tokens/s",
        "run: step 5/10  loss 2.3457  12,346 tokens/s  10 s left",
        "run: step 8/10  loss 2.3457  12,346 tokens/s  4 s left",
        "run: step 10/10  loss 2.3457  12,346 tokens/s  0 s left",
    ]


def test_a_line_of_a_sweep_says_what_is_left_at_the_pace_so_far(clock, tmp_path, capsys):
    """5 runs, 1 done before; of the 4, two took 60 s side by side: 30 s a run, so that 60 are left."""
    shown = progress.SweepProgress(tmp_path, 5, 1, 2)
    shown.started("a")
    shown.started("b")
    clock.now = 150.0
    shown.ended("a", "finished")
    clock.now = 160.0
    shown.ended("b", "failed")
    lines = capsys.readouterr().err.splitlines()[2:]
    assert lines[0] == "a: finished after 50 s (2 of 5 runs done, about 0:02:30 left)"
    assert lines[1] == "b: failed after 60 s (2 of 5 runs done, about 0:01:00 left)"


def test_the_bar_of_a_running_run_shows_the_newest_whole_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert progress.last_train_line(metrics) is None
    line = '{{"kind": "train", "step": {}, "loss": 1.0}}\n'.format
    metrics.write_text("".join(map(line, range(3000))) + '{"kind": "event", "step": 2999}\n' + line(3000)[:30])
    assert progress.last_train_line(metrics)["step"] == 2999


def test_a_line_of_items(clock, capsys):
    shown = progress.ItemProgress("run", "answers", 40, every_s=0.0)
    shown.advance(10)
    clock.now = 120.0
    shown.advance(10)
    assert capsys.readouterr().err == "run: answers 10/40\nrun: answers 20/40  40 s left\n"
