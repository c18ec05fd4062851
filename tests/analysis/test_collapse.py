"""What experiments/collapse.py prints is the loss of a run with its streams replaced by one vector from a sub-layer on."""

import re

import jax
import numpy as np
import pytest
from support.in_process import run_here
from support.tiny_runs import run_script, tiny, write_text

from mhc_jax import checkpoint
from mhc_jax.data import load_data
from mhc_jax.loop import train
from mhc_jax.mapping import from_mapping, to_mapping
from mhc_jax.train_step import init_state, make_eval_step

FROM = ["unchanged", "from 1", "from 2", "from 3", "from 4"]


def losses(out):
    return {name: float(loss) for name, loss in re.findall(r"(unchanged|from \d) ([\d.]+)", out)}


def own_loss(config, params):
    step = jax.jit(make_eval_step(config))
    return np.mean([step(params, batch) for batch in load_data(config.data).validation_batches(2)])


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


def test_every_sub_layer_from_the_first_replaced_reads_one_vector(text, monkeypatch):
    """Four sub-layers of mHC whose streams differ: the first reads the entry, the others what was written before them."""
    config = tiny(text, "mhc:init=home:t_max=2", model={"num_layers": 2, "vocab_size": 264})
    params = jax.jit(lambda: init_state(config).params)()
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + random.normal(0, 0.3, a.shape).astype(np.float32), params)
    monkeypatch.setattr(checkpoint, "load_params", lambda folder: (to_mapping(config), params))
    status, out, _ = run_here("collapse", "--checkpoint=run", "--batches=2")
    found = losses(out)
    assert (status, list(found)) == (0, FROM)
    assert found["unchanged"] == pytest.approx(own_loss(config, params), abs=1e-4)
    assert found["from 1"] == found["from 2"], "no write comes before the first"
    assert len(set(found.values())) == 4, "the others are all different"


@pytest.mark.full
def test_losses_of_a_run(text, tmp_path):
    """HC's streams are one vector after two steps, so that nothing moves."""
    train(tiny(text, "hc", model={"num_layers": 2}, train={"steps": 2, "validate_every": 0}), tmp_path / "run")
    status, out, err = run_script("collapse", f"--checkpoint={tmp_path / 'run'}", "--batches=2")
    assert status == 0, err
    found = losses(out)
    mapping, params = checkpoint.load_params(tmp_path / "run")
    assert list(found) == FROM
    assert found["unchanged"] == pytest.approx(own_loss(from_mapping(mapping), params), abs=1e-4)
    assert max(abs(loss - found["unchanged"]) for loss in found.values()) < 2e-4


def test_a_run_of_one_stream_is_refused(text, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_params", lambda folder: (to_mapping(tiny(text, "residual")), {}))
    status, _, err = run_here("collapse", "--checkpoint=run")
    assert (status, "has one stream" in err) == (2, True)
