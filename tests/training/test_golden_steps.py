"""Loss, gradient norm and gains of every kind after one step and after ten are those of the golden file.

The golden file says what this project computed, not what is right: oracles and formulas are tested elsewhere.  Updating it
is legitimate when a change is meant to change numbers (a corrected formula, another initialisation, another default),
and the CHANGELOG then names the change under "numerics changed".  It is not legitimate after a change of structure,
speed, names or versions of packages: find out what moved instead.  To update it:

    PYTHONPATH=tests python tests/training/test_golden_steps.py
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.decoders import EXPERTS, MLA, MODEL
from support.thinned import thin
from support.tolerances import ANOTHER_PROGRAM, ROUTED_STEPS, TEN_STEPS, assert_close

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from mhc_jax.diagnostics import summarize
from mhc_jax.train_step import init_state, make_diagnostics_step, make_train_step

GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "steps.json"
MODELS = {kind: (kind, {}) for kind in connections.KINDS}
MODELS |= {"mhc:init=home": ("mhc:init=home", {}), "mhc with experts and latent attention": ("mhc", MLA | EXPERTS)}
GAINS = ("composite_forward", "composite_backward", "composite_forward_norm")


def measure(name):
    """Step (1 or 10) -> loss and gradient norm of that step, and the largest gains after it."""
    spec, settings = MODELS[name]
    model = dataclasses.replace(MODEL, connection=connections.parse(spec), **settings)
    config = ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=12, batch_size=2),
        # AdamW divides by the size of the gradient: a usual eps would make rounding of small ones into whole steps.
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, eps=1e-3),
        train=TrainConfig(steps=10),
    )
    random = np.random.default_rng(0)
    state = jax.jit(lambda: init_state(config))()
    step, diagnose = jax.jit(make_train_step(config)), jax.jit(make_diagnostics_step(config, sample=8))
    out = {}
    for k in range(1, 11):
        text = random.integers(0, model.vocab_size, (2, 13))
        batch = {"inputs": text[:, :-1].astype(np.int32), "targets": text[:, 1:].astype(np.int32)}
        state, metrics = step(state, batch)
        if k in (1, 10):
            gains = summarize(diagnose(state.params, batch["inputs"]))
            out[str(k)] = {key: float(metrics[key]) for key in ("loss", "grad_norm")}
            out[str(k)] |= {key: float(gains[key].max()) for key in GAINS}
    return out


@pytest.mark.parametrize("name", thin(MODELS, lambda name: name in ("residual", "hc", "mhc")))
def test_one_step_and_ten_are_golden(name):
    golden = json.loads(GOLDEN.read_text())[name]
    for k, values in measure(name).items():
        bound = ROUTED_STEPS if "experts" in name else TEN_STEPS if k == "10" else ANOTHER_PROGRAM
        for key, value in values.items():
            assert_close(value, golden[k][key], bound, f"{name}, step {k}, {key}")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: measure(name) for name in MODELS}, indent=1) + "\n")
