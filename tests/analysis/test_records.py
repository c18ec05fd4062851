"""Run folders read back: what a stop leaves, what is done again, what is missing, and what runs are called."""

import dataclasses
import json

import numpy as np
import pytest
from support.synthetic_runs import STEPS, SUBLAYERS, make_run, write_run
from support.tiny_runs import lines

from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import InputError
from mhc_jax.mapping import to_mapping
from mhc_jax.records import flatten, labels, last_diagnostics, not_defaults, read_run, series
from mhc_jax.results import measurements


def append(folder, text):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)


def train_line(step, loss):
    return json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n"


def test_reads_back_what_was_written(tmp_path):
    record = make_run(tmp_path, "hc", "hc", spikes=(90,))
    steps, loss = series(record, "train", "loss")
    expected = [(line["step"], line["loss"]) for line in lines(record.folder, "train")]
    assert list(zip(steps, loss, strict=True)) == expected
    steps, gain = series(record, "diagnostics", "composite_forward")
    assert steps.tolist() == [50, 100, 150, 200]
    assert gain.shape == (4, SUBLAYERS)
    assert gain.tolist() == [line["composite_forward"] for line in lines(record.folder, "diagnostics")]
    assert (record.name, record.kind, record.num_streams, record.status) == ("hc", "hc", 4, "finished")
    assert (record.spike_steps, record.diverged_at) == ([90], None)


def test_null_is_nan_and_a_diverged_run_says_where(tmp_path):
    record = make_run(tmp_path, "run", "hc", diverged_at=84)
    steps, loss = series(record, "train", "loss")
    assert steps[-1] == 84
    assert np.isnan(loss[-1])
    assert np.isfinite(loss[:-1]).all()
    assert (record.diverged_at, record.status) == (84, "diverged")
    (tmp_path / "run" / "summary.json").unlink()
    record = read_run(tmp_path / "run")
    assert record.summary is None
    assert (record.diverged_at, record.status) == (84, "diverged"), "known from the event alone"


@pytest.mark.parametrize("broken", ['{"kind": "train", "st', "3", '{"kind": "train"}', "\xff"])
def test_a_broken_line_is_left_out_at_the_end_and_named_by_its_number_in_the_middle(tmp_path, broken):
    folder = write_run(tmp_path, "run", "mhc")
    whole = (folder / "metrics.jsonl").read_text()
    append(folder, train_line(STEPS + 2, 1.0)[:-9])
    assert series(read_run(folder), "train", "step")[0][-1] == STEPS
    (folder / "metrics.jsonl").write_text(whole + broken + "\n" + train_line(STEPS + 2, 1.0))
    with pytest.raises(InputError, match=rf"^Line {len(whole.splitlines()) + 1} of .*metrics\.jsonl"):
        read_run(folder)


def test_steps_done_again_after_a_resume_replace_the_first_attempt(tmp_path):
    folder = write_run(tmp_path, "run", "hc", spikes=(50, 100, 150))
    append(folder, json.dumps({"kind": "event", "step": 100, "event": "resumed"}) + "\n")
    append(folder, train_line(102, 7.0))
    record = read_run(folder)
    steps, loss = series(record, "train", "loss")
    assert steps[-2:].tolist() == [100, 102]
    assert loss[-1] == 7.0
    assert series(record, "validation", "loss")[0].tolist() == [50, 100]
    assert [(e["event"], e["step"]) for e in record.events] == [("spike", 50), ("spike", 100), ("resumed", 100)]


def test_wrong_folders_and_files_are_told_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        read_run(tmp_path / "nowhere")
    for missing in ("config.json", "metrics.jsonl"):
        (write_run(tmp_path, missing, "mhc") / missing).unlink()
        with pytest.raises(InputError, match=f"is not a run folder: it has no {missing}"):
            read_run(tmp_path / missing)
    folder = write_run(tmp_path, "run", "mhc")
    for name, text, sentence in (
        ("summary", "{", r"summary\.json' is not valid JSON"),
        ("summary", "[]", r"summary\.json' must hold a JSON object"),
        ("config", '{"model": {}}', r"has no model\.connection\.kind"),
    ):
        (folder / f"{name}.json").write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_run(folder)


def test_optional_files_and_keys_may_be_missing(tmp_path):
    folder = write_run(tmp_path, "run", "mhc", drop=("grad_norm", "h_res"))
    (folder / "env.json").unlink()
    (folder / "summary.json").unlink()
    record = read_run(folder)
    assert (record.env, record.status) == ({}, "no summary")
    assert [len(values) for values in series(record, "train", "grad_norm")] == [0, 0]
    assert len(series(record, "diagnostics", "h_res")[0]) == 0
    assert last_diagnostics(record, "h_res") is None
    with pytest.raises(InputError, match="must be one of 'train', 'validation', 'diagnostics'"):
        series(record, "valid", "loss")


def test_last_diagnostics_skips_lines_without_a_finite_number(tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    append(folder, '{"kind": "diagnostics", "step": 250, "row_error": [null, null]}\n')
    append(folder, '{"kind": "diagnostics", "step": 300, "row_error": null}\n')
    assert last_diagnostics(read_run(folder), "row_error")[0] == 200
    append(folder, '{"kind": "diagnostics", "step": 350, "row_error": [null, 2.0]}\n')
    step, value = last_diagnostics(read_run(folder), "row_error")
    assert step == 350
    np.testing.assert_array_equal(value, [np.nan, 2.0])


def test_the_largest_norm_is_that_of_the_steps_after_the_warm_up(tmp_path):
    record = make_run(tmp_path, "run", "hc", config={"optimizer.warmup_steps": 4})
    train = {"step": np.arange(1.0, 7), "grad_norm": np.asarray([9.0, 8, 7, 6, 2, np.nan]), "clipped": np.ones(6) * 0.5}
    found = measurements(dataclasses.replace(record, train=train))
    assert (found["max_grad_norm"], found["clipped_fraction"]) == (2, 0.5)


def test_flattened_settings_and_those_that_are_no_defaults():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
    config = to_mapping(ExperimentConfig())
    assert not_defaults(config) == {}
    config["optimizer"]["grad_clip"] = 0.5
    config["train"]["seed"] = 7
    config["model"]["connection"]["num_streams"] = 8
    assert not_defaults(config) == {"optimizer.grad_clip": 0.5}


def test_labels_tell_folders_of_one_name_apart(tmp_path):
    runs = [make_run(tmp_path / folder, kind, kind) for folder, kind in (("a", "hc"), ("b", "hc"), ("b", "mhc"))]
    assert labels(runs) == ["hc", "hc'", "mhc:init=paper"]
