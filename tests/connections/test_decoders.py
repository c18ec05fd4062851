"""Decoders with every kind of connection: nothing looks ahead, diagnostics see all of it, H_res and its logits are alive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import decoder_of, logits_of, randomized
from support.thinned import thin

from mhc_jax import connections
from mhc_jax.diagnostics import summarize
from mhc_jax.model import Decoder

TOKENS = jnp.arange(12)[None]
"""Every position has an embedding row of its own."""
SPECS = [f"{kind}:t_max=2" if kind in ("mhc", "single_pass") else kind for kind in connections.KINDS]
ALIKE = ("identity", "mhc_lite", "kromhc", "circulant")
"""Kinds of which one, `identity`, stands for the others in the fast suite."""
KINDS = thin(SPECS, lambda spec: spec not in (*ALIKE[1:], "residual", "scalar_gated"))


@functools.cache
def program(spec):
    """parameters -> (logits, diagnostics), and the gradient of the logits of position 5, compiled."""

    def loss(params):
        logits, collected = Decoder(decoder_of(spec)).apply({"params": params}, TOKENS, 5)
        return (logits[0, 5] ** 2).sum(), (logits, collected)

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def run(spec):
    """Diagnostics and gradient at parameters that are not the initial ones."""
    gradient, (_, collected) = program(spec)(randomized(logits_of(spec)[1], spread=0.1))
    return gradient, collected


@pytest.mark.parametrize("spec", KINDS)
def test_no_logit_depends_on_a_later_token(spec):
    """The gradient of position t with respect to embeddings after t is exactly zero."""
    gradient, _ = run(spec)
    per_token = np.abs(gradient["embedding"]).max(-1)
    assert (per_token[:6] > 0).all(), "position 5 sees tokens 0 to 5"
    np.testing.assert_array_equal(per_token[6:12], 0)


@pytest.mark.parametrize("spec", KINDS)
def test_every_kind_gives_the_diagnostics(spec):
    _, collected = run(spec)
    config = connections.parse(spec)
    n = config.num_streams
    assert collected["res"].shape == (6, 5, n, n)
    record = summarize(collected)
    assert record["stream_rms"].shape == (6, n)
    assert all(np.isfinite(v).all() for v in record.values())
    if config.kind in (*ALIKE, "gated", "attnres_block"):
        np.testing.assert_allclose(record["composite_forward"], 1, atol=1e-5)
        np.testing.assert_allclose(record["composite_backward"], 1, atol=1e-5)


def test_h_res_is_applied_and_streams_persist():
    """The bugs that silently void a comparison: a computed but unused H_res, streams collapsed in every block."""
    spec = "mhc:init=home:t_max=2"
    params = randomized(logits_of(spec)[1])
    link = params["layers"]["attention_connection"]
    res = np.random.default_rng(1).normal(size=16).astype(np.float32)
    moved = {**link, "bias": link["bias"].at[1, 8:].set(res)}  # H_res of block 1 alone
    _, (base, diagnostics) = program(spec)(params)
    _, (other, _) = program(spec)({**params, "layers": {**params["layers"], "attention_connection": moved}})
    assert float(np.abs(other - base).max()) > 1e-3
    assert diagnostics["stream_rms"].shape == (6, 4)
    assert float(diagnostics["stream_rms"].std(-1).max()) > 1e-2, "streams differ between blocks"


@pytest.mark.parametrize("spec", ["mhc:init=home:t_max=2", "mhc:entry=scaled:disable=pre+post:t_max=2"])
def test_step_zero_gradient_of_h_res_logits_is_alive_once_streams_differ(spec):
    """By where branches write, or by the scaled entry, with which H_res alone has something to mix and the scales learn."""
    gradient, _ = program(spec)(logits_of(spec)[1])
    bias = gradient["layers"]["mlp_connection"]["bias"][:, -16:]
    assert float(np.abs(bias).max()) > 1e-6
    if "scaled" in spec:
        assert float(np.abs(gradient["ends"]["entry_scale"]).max()) > 0
