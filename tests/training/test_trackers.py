"""TensorBoard and wandb show what metrics.jsonl says, under the names of docs/trackers.md, and cannot break a run."""

import importlib
import itertools
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from support import tracker_files
from support.tiny_runs import ROOT, lines

from mhc_jax.config.compound import Wandb, read_tracker
from mhc_jax.errors import InputError
from mhc_jax.runs import trackers
from mhc_jax.runs.metrics import MetricsWriter

L, N = 4, 2


def diagnostics(seed: int) -> dict:
    """A diagnostics line of 4 sub-layers with 2 streams; its gains span eight orders of magnitude."""
    draw = np.random.default_rng(seed)
    out = {key: draw.normal(size=L) for key in ("row_error", "column_error", "saturation", "res_logit_min")}
    out |= {f"composite_{side}": 10.0 ** draw.uniform(0, 8, L) for side in ("forward", "backward")}
    out |= {key: draw.uniform(-1, 4, L) for key in ("stream_cosine", "stream_cosine_abs", "stream_rank")}
    out |= {"res_logit_max": draw.normal(size=L), "h_res": draw.normal(size=(L, N, N)), "entropy": draw.normal(size=L)}
    return out | {"grad_norm_per_layer": draw.uniform(0, 1, L // 2)}


def expected(line: dict) -> dict[str, float]:
    """The numbers of a diagnostics line by loops over its lists."""
    largest = ("composite_forward", "composite_backward", "row_error", "column_error", "res_logit_max")
    out = {f"max_{key}": sorted(line[key])[-1] for key in largest}
    out |= {"min_res_logit_min": sorted(line["res_logit_min"])[0]}
    blocks = sorted(line["grad_norm_per_layer"])
    out |= {"min_grad_norm_per_layer": blocks[0], "max_grad_norm_per_layer": blocks[-1]}
    means = ("stream_cosine", "stream_cosine_abs", "stream_rank", "saturation")
    return out | {f"mean_{key}": math.fsum(line[key]) / len(line[key]) for key in means}


def flat(values) -> list[float]:
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


HISTOGRAMS = ("composite_forward", "composite_backward", "h_res", "grad_norm_per_layer")
SPIKE = {"event": "spike", "loss": 9.5, "median": 3.25}


def write(folder, *entries: str) -> list[dict]:
    """Write a small run, and return its diagnostics lines as metrics.jsonl has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder, -1, entries, {"train": {"seed": 0}}) as writer:
        writer.write("diagnostics", 0, diagnostics(0))
        writer.write("train", 1, {"loss": 2.5})
        writer.write("event", 1, SPIKE)
        writer.write("validation", 2, {"loss": 2.25, "bits_per_byte": math.nan})
        writer.write("diagnostics", 2, diagnostics(1))
    return lines(folder, "diagnostics")


def test_tensorboard_shows_what_the_lines_say(tmp_path):
    written = write(tmp_path, "tensorboard")
    shown = tracker_files.tensorboard(tmp_path)
    wanted = {f"diagnostics/{name}": {} for name in expected(written[0])}
    for line in written:
        for name, value in expected(line).items():
            wanted[f"diagnostics/{name}"][line["step"]] = np.float32(value)
    assert shown.scalars == wanted | {"train/loss": {1: 2.5}, "validation/loss": {2: 2.25}}
    assert set(shown.histograms) == {f"diagnostics/{name}" for name in HISTOGRAMS}
    for line in written:
        for name in HISTOGRAMS:
            values, found = flat(line[name]), shown.histograms[f"diagnostics/{name}"][line["step"]]
            assert (found.num, found.min, found.max) == (len(values), min(values), max(values))
            assert found.sum == pytest.approx(sum(values), rel=1e-12)
            lower = -math.inf
            for upper, count in zip(found.bucket_limit, found.bucket, strict=True):
                assert count == sum(lower <= value < upper for value in values)
                lower = upper
    assert shown.events == {1: "spike: loss 9.5, median 3.25"}


@pytest.mark.full
def test_an_offline_run_of_wandb_has_what_the_lines_say(tmp_path, monkeypatch):
    """The real wandb starts a process of its own; its file is read by its own protocol."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "sweep.json").write_text("{}")
    written = write(tmp_path / "run", "wandb:project=demo:tags=a+b:mode=offline")
    importlib.import_module("wandb").teardown()  # ends the process, which may still be writing the file
    shown = tracker_files.wandb(tmp_path / "run")
    assert (shown.run.project, shown.run.display_name, [*shown.run.tags]) == ("demo", "run", ["a", "b"])
    assert shown.run.run_group == tmp_path.name, "the folder of the sweep"
    assert shown.run.run_id == (tmp_path / "run" / "wandb_id").read_text()
    for line in written:
        row = shown.rows[line["step"]]
        found = {name: row[f"diagnostics/{name}"] for name in expected(line)}
        assert found == pytest.approx(expected(line), rel=1e-12)
        for name in HISTOGRAMS:
            counts, edges = row[f"diagnostics/{name}/values"], row[f"diagnostics/{name}/bins"]
            inside = [sum(low <= value < high for value in flat(line[name])) for low, high in itertools.pairwise(edges)]
            assert counts == inside
            assert sum(counts) == len(flat(line[name]))
    assert shown.rows[1]["train/loss"] == 2.5
    assert shown.rows[1]["event"] == "spike: loss 9.5, median 3.25"
    assert shown.rows[2]["validation/loss"] == 2.25
    assert "validation/bits_per_byte" not in shown.rows[2]


class StandIn:
    """Stands for the module wandb: it notes what it is given, and each call of `refuse` may raise an error."""

    def __init__(self, refuse=lambda what: None):
        self.begun, self.logged, self.refuse = [], [], refuse

    def init(self, **given):
        self.refuse(given)
        self.begun.append(given)
        return types.SimpleNamespace(log=self.log, finish=lambda: self.refuse("finish"))

    def log(self, row, step):
        self.refuse(step)
        self.logged.append((row, step))

    def teardown(self):
        pass

    def Histogram(self, np_histogram):  # noqa: N802
        return np_histogram


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_run_of_this_folder_alone(tmp_path, stand_in):
    for folder in ("a/mhc", "a/mhc", "b/mhc"):
        write(tmp_path / folder, "wandb")
    ids = [given["id"] for given in stand_in.begun]
    assert ids[0] == ids[1] != ids[2]
    assert {given["resume"] for given in stand_in.begun} == {"allow"}
    assert stand_in.logged[1] == ({"train/loss": 2.5}, 1)


def test_names_and_groups_of_wandb_runs(tmp_path, stand_in):
    write(tmp_path / "alone" / "mhc", "wandb")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    write(tmp_path / "sweep" / "mhc", "wandb")
    write(tmp_path / "sweep" / "hc", "wandb:group=demo:name=x:project=p:tags=a+b:mode=online")
    keys = ("name", "group", "project", "tags", "mode")
    assert [tuple(given.get(key) for key in keys) for given in stand_in.begun] == [
        ("mhc", None, None, None, None),
        ("mhc", "sweep", None, None, None),
        ("x", "demo", "p", ("a", "b"), "online"),
    ]


def test_a_server_that_does_not_answer_breaks_no_run(tmp_path, stand_in, capsys):
    def unreachable(what):
        if isinstance(what, dict) and what.get("mode") != "offline":
            raise RuntimeError("no route\nto host.")

    stand_in.refuse = unreachable
    assert len(write(tmp_path, "wandb")) == 2
    assert [given["mode"] for given in stand_in.begun] == ["offline"]
    told = "warning: wandb does not answer (no route to host); this run is logged offline, `wandb sync` sends it later."
    assert capsys.readouterr().err.splitlines() == [told]
    assert len(stand_in.logged) == 5


@pytest.mark.parametrize(("fails", "logged"), [(1, 1), ("finish", 5)])
def test_a_tracker_that_fails_is_left_out(fails, logged, tmp_path, stand_in, capsys):
    def refuse(what):
        if what == fails:
            raise ConnectionResetError("gone")

    stand_in.refuse = refuse
    write(tmp_path, "tensorboard", "wandb")
    told = "warning: wandb has failed (gone); the run goes on without it, and metrics.jsonl has all lines."
    assert capsys.readouterr().err.splitlines() == [told]
    assert (len(lines(tmp_path)), len(stand_in.logged)) == (5, logged)
    assert set(tracker_files.tensorboard(tmp_path).scalars) > {"train/loss", "diagnostics/mean_saturation"}


def test_what_wandb_refuses_offline_too_is_a_mistake(tmp_path, stand_in):
    def refuse(what):
        raise ValueError("Invalid project name 'a/b'.")

    stand_in.refuse = refuse
    with pytest.raises(
        InputError, match=r"^wandb refuses the settings in train.trackers: Invalid project name 'a/b'\.$"
    ):
        write(tmp_path, "wandb:project=a/b")


def test_settings_of_wandb():
    assert read_tracker("tensorboard") is None
    assert read_tracker("wandb") == Wandb()
    text = "wandb:project=demo:group=g:tags=a+b:name=x=1:mode=offline"
    assert read_tracker(text) == Wandb("demo", "g", ("a", "b"), "x=1", "offline")
    for wrong, told in {
        "wandb:projct=a": r"A setting of train.trackers 'wandb' is 'projct'; .*Did you mean 'project'\?",
        "wandb:project": r"'project' in train.trackers 'wandb:project' is not of the form key=value\.",
        "wandb:mode=ofline": r"train.trackers: mode of wandb is 'ofline'; .*Did you mean 'offline'\?",
        "wandb:tags=a++b": r"wandb has the tags 'a\+\+b', one of them empty\.",
        "tensorboard:x=1": r"train.trackers is 'tensorboard:x=1', and 'tensorboard' has no settings",
    }.items():
        with pytest.raises(InputError, match=told):
            read_tracker(wrong)


def test_numbers_that_are_not_finite_are_left_out():
    line = {
        "composite_forward": [1.0, None],
        "h_res": [[[None, 2.0]]],
        "saturation": [0.5],
        "grad_norm_per_layer": [None],
    }
    assert trackers.scalars("diagnostics", line) == {"diagnostics/mean_saturation": 0.5}
    found = {name: values.tolist() for name, (values, _) in trackers.histograms("diagnostics", line).items()}
    assert found == {"diagnostics/composite_forward": [1.0], "diagnostics/h_res": [2.0]}


@pytest.mark.parametrize("values", [[1.0] * 3, [0.0], [1e30, 1e30], [-1e-30, 1e60]])
def test_bins_hold_all_values(values):
    ((_, edges),) = trackers.histograms("diagnostics", {"composite_forward": values}).values()
    assert len(edges) == 65
    assert (np.diff(edges) > 0).all()
    assert np.histogram(values, edges)[0].sum() == len(values)


def test_the_page_names_what_trackers_get():
    """docs/trackers.md has a row for each scalar and each histogram of a diagnostics line."""
    page = (ROOT / "docs" / "trackers.md").read_text()
    line = json.loads(json.dumps({key: value.tolist() for key, value in diagnostics(0).items()}))
    rows = set(re.findall(r"`(diagnostics/\w+)`", page))
    assert rows == {*trackers.scalars("diagnostics", line), *trackers.histograms("diagnostics", line)}
    for text in re.findall(r"wandb:[\w:=+]+", page):
        assert isinstance(read_tracker(text), Wandb), text
