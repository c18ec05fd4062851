"""Connections made as mHC without their dynamic part: `dynamic=False`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support.decoders import TOKENS, decoder_of, drawn, logits_of
from support.tolerances import SLOPES, assert_close

from mhc_jax import connections
from mhc_jax.model import Decoder

C, L, SUBLAYER = 3, 6, 3


def sublayer_of(spec, sublayer=SUBLAYER):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


@pytest.mark.parametrize(
    "kind",
    ["mhc:t_max=3", "identity", "diagonal", "identity_mix:t_max=3", "go_mhc", "circulant", "single_pass:t_max=3"],
)
def test_static_coefficients_are_the_dynamic_ones_without_a_projection(kind):
    """`dynamic=False` gives the coefficients, the logits and the gradient of bias that phi = 0 gives, and has no phi."""
    dynamic, static = sublayer_of(kind), sublayer_of(f"{kind}:dynamic=False")
    streams, _ = jax.tree.map(jnp.asarray, sublayer_of(kind, None).start(jnp.ones((2, 3, C))))
    params = drawn(functools.partial(static.init, method="coefficients"), streams, seed=5)["params"]
    assert {"bias"} <= {*params} <= {"bias", "share_logit"}
    zero = {
        **jax.eval_shape(functools.partial(dynamic.init, method="coefficients"), jax.random.key(0), streams)["params"]
    }
    zero = {name: params[name] if name in params else jnp.zeros(leaf.shape) for name, leaf in zero.items()}

    def values(link, params):
        c = link.apply({"params": params}, streams, method="coefficients")
        logits = link.apply({"params": params}, streams, method="mixing_logits")
        return sum((k + 1) * (a * a).sum() for k, a in enumerate(jax.tree.leaves(c))), (c, logits)

    (grad, out), (grad_zero, out_zero) = (
        jax.grad(functools.partial(values, link), has_aux=True)(p) for link, p in ((static, params), (dynamic, zero))
    )
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(out_zero), strict=True):
        assert_close(a, b)
    for name in params:
        assert_close(grad[name], grad_zero[name], SLOPES, name)


@pytest.mark.parametrize("kind", ["mhc", "identity", "hc"])
def test_a_static_connection_that_learns_no_coefficient_is_a_residual_with_a_scaled_embedding(kind):
    """`entry=scaled` alone has parameters, and every stream is given each output whole."""
    parts = "pre+post" if kind == "identity" else "pre+post+res"
    logits, params = logits_of(f"{kind}:dynamic=False:entry=scaled:exit=mean:disable={parts}")
    assert {*params["ends"]} == {"entry_scale"}
    assert not {*params["layers"]} & {"attention_connection", "mlp_connection"}
    residual = {**params, "embedding": params["embedding"] * params["ends"]["entry_scale"].mean(0, keepdims=True)}
    residual.pop("ends")
    expected = Decoder(decoder_of("residual")).apply({"params": residual}, TOKENS)[0]
    assert_close(logits, expected)
