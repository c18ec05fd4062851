"""experiments/collapse.py: the loss of a run with its streams replaced by one vector."""

import re

import jax
import numpy as np
import pytest
from support.tiny_runs import run_script, tiny, write_text

from mhc_jax.checkpoint import load_params
from mhc_jax.data import load_data
from mhc_jax.loop import train
from mhc_jax.mapping import from_mapping
from mhc_jax.train_step import make_eval_step


@pytest.mark.parametrize("kind", ["hc", "mhc:init=home"])
def test_losses_of_a_run(kind, tmp_path):
    """Unchanged is the checkpoint's own loss; mHC of `home` needs its streams, HC's are one vector after two steps."""
    model = {"num_layers": 2}
    config = tiny(write_text(tmp_path / "text.txt"), kind, model=model, train={"steps": 2, "validate_every": 0})
    train(config, tmp_path / "run")
    status, out, err = run_script("collapse", f"--checkpoint={tmp_path / 'run'}", "--batches=2")
    assert status == 0, err
    found = {name: float(loss) for name, loss in re.findall(r"(unchanged|from \d) ([\d.]+)", out)}
    assert list(found) == ["unchanged", "from 1", "from 2", "from 3", "from 4"]
    mapping, params = load_params(tmp_path / "run")
    config = from_mapping(mapping)
    batches = load_data(config.data).validation_batches(2)
    expected = np.mean([jax.jit(make_eval_step(config))(params, batch) for batch in batches])
    assert found["unchanged"] == pytest.approx(expected, abs=1e-4)
    moved = max(abs(loss - found["unchanged"]) for loss in found.values())
    assert moved < 2e-4 if kind == "hc" else moved > 1e-3


def test_a_run_of_one_stream_is_refused(tmp_path):
    train(tiny(write_text(tmp_path / "text.txt"), "residual", train={"steps": 2}), tmp_path / "run")
    status, _, err = run_script("collapse", f"--checkpoint={tmp_path / 'run'}")
    assert status == 2
    assert "has one stream" in err
