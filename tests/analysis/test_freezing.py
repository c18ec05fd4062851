"""H_res of a trained mHC model is replaced by the identity, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import MODEL, drawn_decoder
from support.synthetic_runs import write_run
from support.tolerances import assert_close

from mhc_jax import connections
from mhc_jax.analysis.freezing import off_diagonal, without_mixing
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder

TOKENS = jnp.arange(24).reshape(2, 12) % 31


def config_of(spec):
    return ExperimentConfig().with_settings(model={**vars(MODEL), "connection": connections.parse(spec)})


def test_the_frozen_model_is_the_trained_one_with_logits_that_make_the_identity():
    """Logits of +-200 make Sinkhorn's matrix the identity in float32, which is the independent way to the same model."""
    config = config_of("mhc:init=home:num_streams=3")
    params = drawn_decoder(config.model, seed=3)
    frozen, cut = without_mixing(config, params)
    identity = jax.tree.map(jnp.asarray, params)
    for name in ("attention_connection", "mlp_connection"):
        arrays = identity["layers"][name]
        arrays["bias"] = arrays["bias"].at[:, 6:].set((400 * jnp.eye(3) - 200).ravel()[None])
        arrays["alpha"] = arrays["alpha"].at[:, 2].set(0)
    logits = Decoder(frozen.model).apply({"params": cut}, TOKENS)[0]
    assert_close(logits, Decoder(config.model).apply({"params": identity}, TOKENS)[0])
    assert np.abs(logits - Decoder(config.model).apply({"params": params}, TOKENS)[0]).max() > 1e-3


@pytest.mark.parametrize("spec", ["identity", "hc", "mhc:disable=pre", "residual"])
def test_other_models_are_refused(spec):
    with pytest.raises(InputError, match="H_res can be frozen in a model of `mhc` that learns pre, post and res"):
        without_mixing(config_of(spec), {})


def test_static_models_have_a_bias_alone():
    config = config_of("mhc:init=home:dynamic=False")
    frozen, cut = without_mixing(config, drawn_decoder(config.model))
    assert cut["layers"]["mlp_connection"]["bias"].shape == (3, 8)
    expected = dataclasses.replace(config.model.connection, disable=("res",))
    assert frozen.model.connection == expected


def test_the_share_of_h_res_off_its_diagonal(tmp_path):
    run = read_run(write_run(tmp_path, "run", "mhc"))
    mixed = np.stack([np.eye(4), np.full((4, 4), 0.25)])
    lines = [{"h_res": np.stack([np.eye(4)] * 2)}, {"h_res": mixed}]
    assert off_diagonal(dataclasses.replace(run, diagnostics=lines)) == pytest.approx((0.0, 0.375))
    with pytest.raises(InputError, match=r"no diagnostics of H_res"):
        off_diagonal(dataclasses.replace(run, diagnostics=[]))
