"""Runs that start from another run or a converted model: the same function at step 0, a branch of a run, and what is refused."""

import json

import jax
import numpy as np
import pytest
from support.in_process import run_here
from support.thinned import thin
from support.tiny_runs import final_state, lines, tiny, with_train

from mhc_jax import connections, loop
from mhc_jax.data import ByteTokenizer, load_data, resolve_tokenizer
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.runs import warm_start


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    """(configuration, folder) of a finished residual run of 4 steps with a constant learning rate."""
    config = tiny(text, "residual", optimizer={"schedule": "constant"}, train={"steps": 4, "checkpoint_every": 0})
    folder = tmp_path_factory.mktemp("source") / "run"
    assert loop.train(config, folder)["status"] == "finished"
    return config, folder


def from_source(source, spec="residual", model=None, data=None, optimizer=None, **train):
    """The configuration of a run that starts from `source` with another connection or other settings."""
    config, folder = source
    given = {"connection": connections.parse(spec)} | (model or {})
    changed = config.with_settings(model=given, data=data or {}, optimizer=optimizer or {})
    return with_train(changed, init_from=str(folder), **train)


STARTS = ["identity", "mhc:init=paper", "hc", "delta_attnres", "mudd"]


@pytest.mark.parametrize("spec", thin(STARTS, lambda spec: spec != "mudd"))
def test_a_residual_model_is_given_streams_without_a_jump(source, tmp_path, spec):
    """The loss of the first step is that of the residual model on the same batch."""
    losses = []
    for kind in ("residual", spec):
        loop.train(from_source(source, kind, steps=2), tmp_path / kind)
        losses.append([line["loss"] for line in lines(tmp_path / kind, "train")])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=2e-6)
    assert losses[1][0] < lines(source[1], "train")[0]["loss"] - 0.1, "the parameters are those after training"
    env = read_json(tmp_path / spec / "env.json")
    assert env["init_from"] == {"folder": str(source[1]), "step": 4, "connection": "residual", "state": "parameters"}


def test_the_same_kind_takes_its_connection_along(text, tmp_path):
    config = tiny(text, "mhc", optimizer={"learning_rate": 0.1}, train={"steps": 4, "checkpoint_every": 0})
    loop.train(config, tmp_path / "first")
    again = with_train(config, init_from=str(tmp_path / "first"), steps=2)
    loop.train(again, tmp_path / "again")
    first = lines(tmp_path / "again", "train")[0]["loss"]
    run_here("convert", tmp_path / "first", tmp_path / "model", "--to=model")
    loop.train(with_train(again, init_from=str(tmp_path / "model")), tmp_path / "from-model")
    assert lines(tmp_path / "from-model", "train")[0]["loss"] == first
    other = again.with_settings(model={"connection": connections.parse("mhc:disable=pre+post")})
    with pytest.raises(InputError, match=r"with mhc:disable=pre.post:init=paper instead of mhc:init=paper, logits"):
        loop.train(other, tmp_path / "other")


def test_more_steps_are_those_of_a_longer_run(source, tmp_path):
    """With the whole state, 4 steps and then 4 more are bitwise 8 steps, for a schedule that does not look ahead."""
    config, _ = source
    loop.train(with_train(config, steps=8), tmp_path / "whole")
    longer = from_source(source, steps=8, init_state="all")
    loop.train(longer, tmp_path / "more")
    assert [line["step"] for line in lines(tmp_path / "more", "train")] == [5, 6, 7, 8]
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "more"), final_state(tmp_path / "whole"))
    assert lines(tmp_path / "more", "train") == lines(tmp_path / "whole", "train")[4:]


def test_a_wsd_branch_decays_from_where_the_run_stood(source, tmp_path):
    branch = from_source(source, steps=5, init_state="all").with_settings(optimizer={"schedule": "wsd"})
    loop.train(branch, tmp_path / "branch")
    [last] = lines(tmp_path / "branch", "train")
    assert (last["step"], last["learning_rate"]) == (5, pytest.approx(3e-4))


def test_another_text_begins_at_its_start(source, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("stream", "river"))
    config = from_source(source, data={"source": str(other)}, steps=5, init_state="all")
    data = load_data(config.data)
    config = resolve_tokenizer(config, data)
    assert warm_start.warm_start(config, None, data).data_state is None
    same = resolve_tokenizer(from_source(source, steps=5, init_state="all"), data := load_data(source[0].data))
    assert warm_start.warm_start(same, None, data).data_state == {"next_index": 4}


REFUSED = [
    ({"spec": "mhc:init=home"}, "would not begin as the model .* mhc:init=home instead of residual, logits differ"),
    ({"model": {"mlp_width": 32}}, r"another one \(model.mlp_width: 16 -> 32\)"),
    ({"model": {"tied_embeddings": True}}, "model.tied_embeddings: False -> True"),
    ({"model": {"norm_eps": 1e-5}}, "model.norm_eps: 1e-20 -> 1e-05"),
    ({"spec": "identity", "init_state": "all"}, "'all', and .* the connection residual instead of identity"),
    ({"data": {"batch_size": 8}, "init_state": "all"}, "data.batch_size is 8 instead of the 4"),
    ({"optimizer": {"name": "muon"}, "init_state": "all"}, "has other parts: it has optimizer.name 'adamw'.*use these"),
    ({"init_state": "all", "steps": 4}, "train.steps is 4, and .* has done 4 steps already"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_before_anything_is_written(source, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        loop.train(from_source(source, **{"steps": 8} | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_no_such_thing_are_told(source, tmp_path):
    config, folder = source
    cases = [(tmp_path / "nowhere", "is no folder"), (tmp_path, "holds no checkpoint")]
    for given, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            loop.train(with_train(config, init_from=str(given)), tmp_path / "run")
    with pytest.raises(InputError, match=r"train.init_state is 'all', and train.init_from names no folder"):
        with_train(config, init_state="all")
    run_here("convert", folder, tmp_path / "model", "--to=model")
    with pytest.raises(InputError, match="a converted model without a state of the optimizer"):
        loop.train(with_train(config, init_from=str(tmp_path / "model"), init_state="all"), tmp_path / "run")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(ByteTokenizer.fingerprint.encode(), b"0" * 64))
    file.with_name("checksums.json").unlink()
    with pytest.raises(InputError, match="The tokenizer is not the one"):
        loop.train(with_train(config, init_from=str(tmp_path / "model")), tmp_path / "run")


def test_the_config_file_takes_the_settings_of_the_folder(source, tmp_path):
    _, folder = source
    file = f"--config=experiments/configs/warm_start.py:{folder},mhc"
    status, _, error = run_here("train", file, "--config.train.steps=2", f"--workdir={tmp_path / 'run'}")
    assert status == 0, error
    assert f"starting from the parameters of {folder} (step 4, residual), with those of mhc:init=paper new" in error
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["init_from"] == str(folder)
    status, _, error = run_here("train", "--config=experiments/configs/warm_start.py", f"--workdir={tmp_path / 'b'}")
    assert (status, "needs a folder" in error) == (2, True)
