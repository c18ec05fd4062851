"""Connections that read sources of earlier depth: public code, the start as a residual decoder, and what each sub-layer sees."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles_family
from support.decoders import OPTIMIZED, TOKENS, decoder_of, logits_of
from support.tolerances import GOLDEN, assert_close

from mhc_jax import connections
from mhc_jax.connections.depth_family import attention_weights, read_heads
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder

PUBLIC = {
    "attnres_1": "attnres_block:block_size=1:eps_norm=1e-8",
    "attnres_2": "attnres_block:block_size=2:eps_norm=1e-8",
    "attnres_4": "attnres_block:block_size=4:eps_norm=1e-8",
    "delta_1": "delta_attnres:block_size=1:eps_norm=1e-8",
    "mudd_2": "mudd:norms=False:eps_norm=1e-8",
}
"""The files of public code's numbers (tests/support/golden/make_depth.py)."""


def sublayer_of(spec, width, sublayers, sublayer=None):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, width, sublayers, sublayer)


@pytest.mark.parametrize("name", PUBLIC)
def test_reads_and_exit_are_those_of_public_code(name):
    file = np.load(Path(__file__).parents[1] / "support" / "golden" / f"depth_{name}.npz")
    g = {key: jnp.asarray(file[key]) for key in file.files}
    x, A, h, out = (g.pop(key) for key in ("x", "A", "h", "out"))
    L, C = A.shape[:2]
    of = functools.partial(sublayer_of, PUBLIC[name], C, L)

    def params(l):
        """Those of sub-layer l, or of the exit (l = L).  MUDD's mix k comes before sub-layer 2 (k + 1), or is the exit."""
        place = min(max(l // 2 - 1, 0), L // 2 - 1) if name.startswith("mudd") else l
        return {"params": {key: value[place] for key, value in g.items() if place < len(value)}}

    @jax.jit
    def run(x):
        (streams, c), y, read = of().start(x), jnp.zeros_like(x), []
        for l in range(L):
            streams, c, now = of(l).apply(params(l), streams, c, y, method="write_read")
            read.append(now)
            y = jnp.tanh(jnp.matmul(now, A[l], precision="highest"))
        return jnp.stack(read), of().apply(params(L), of().write(streams, c, y), c, method="collapse")

    for what, ours, theirs in zip(("h", "out"), run(x), (h, out), strict=True):
        assert_close(ours, theirs, GOLDEN, what)


@functools.cache
def at_the_start(spec):
    """(logits, gradients by path) of a decoder with the branches of the residual one and an initial connection."""
    config, params = decoder_of(spec), logits_of(spec)[1]

    def loss(params):
        logits, _ = Decoder(config).apply({"params": params}, TOKENS)
        return (logits**2).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile(OPTIMIZED)(params)
    return logits, {path_of(path): a for path, a in jax.tree_util.tree_leaves_with_path(gradients)}


def test_delta_attnres_starts_as_the_residual_decoder_bit_for_bit():
    """The logits, and the gradients of all parameters that both have; g has a gradient and w has none."""
    (ours, gradients), (theirs, expected) = (at_the_start(spec) for spec in ("delta_attnres", "residual"))
    np.testing.assert_array_equal(ours, theirs)
    own = {path: a for path, a in gradients.items() if path not in expected}
    for path, a in expected.items():
        np.testing.assert_array_equal(gradients[path], a, err_msg=path)
    gates = {path.split("/")[1]: np.asarray(a) for path, a in own.items() if path.endswith("/g")}
    assert gates["attention_connection"][0] == 0, "the first sub-layer has no source"
    # In the third block the sources add up to the stream, and the norm of the branch removes a multiple of it.
    assert abs(gates["attention_connection"][1]) > 1
    assert abs(gates["attention_connection"][2]) < 1e-4
    assert (np.abs(gates["mlp_connection"]) > 1e-6).all()
    assert all(not np.any(a) for path, a in own.items() if path.endswith("/w"))


@pytest.mark.parametrize("spec", ["mudd", "mudd:norms=False"])
def test_mixes_of_mudd_learn_from_the_first_step(spec):
    """W2 and the biases do, where a group of two sub-layers begins, and in the exit.  W2 hides W1 until it has moved."""
    _, gradients = at_the_start(spec)
    for name in ("W2", "bias"):
        begins = np.abs(gradients[f"layers/attention_connection/{name}"]).reshape(3, -1).max(1)
        assert begins[0] == 0, "there is nothing to mix yet"
        assert (begins[1:] > 1e-6).all()
        assert float(np.abs(gradients[f"ends/{name}"]).max()) > 1e-6
        assert not np.any(gradients[f"layers/mlp_connection/{name}"])


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_the_outer_norm_of_mudd_starts_with_the_derivative_1(eps):
    """The gradient of a bias is then that of the normed stream, whatever epsilon is."""
    random, ends = np.random.default_rng(0), sublayer_of(f"mudd:eps_norm={eps}", 4, 4)
    x, sources, weights = (jnp.asarray(random.normal(size=(1, 2, size)), jnp.float32) for size in (4, 8, 4))
    streams, c = ends.start(x)
    streams = streams._replace(sources=sources)
    params = ends.init(jax.random.key(0), streams, c, method="collapse")
    loss = lambda params: (ends.apply(params, streams, c, method="collapse") * weights).sum()  # noqa: E731
    found = jax.jit(jax.grad(loss))(params)["params"]["bias"]
    X = np.concatenate([sources, x], -1).astype(np.float64).reshape(2, 3, 4)
    terms = X / np.sqrt((X**2).mean(-1, keepdims=True) + eps) * np.asarray(weights).reshape(2, 1, 4)
    assert_close(found, terms.sum((0, 2)))


SEEN = [
    ("attnres_block:block_size=1", [1, 2, 3, 4, 5, 6], 7),
    ("attnres_block:block_size=4", [1, 2, 2, 2, 2, 3], 3),
    ("delta_attnres:block_size=1", [0, 2, 3, 4, 5, 6], 6),
    ("delta_attnres:block_size=4", [0, 1, 1, 1, 2, 2], 2),
    ("mudd:block_size=2", [0, 0, 1, 0, 2, 0], 3),
    ("mudd:block_size=4", [0, 0, 0, 0, 1, 0], 2),
]


@pytest.mark.parametrize(("spec", "seen", "slots"), SEEN, ids=[case[0] for case in SEEN])
def test_a_sublayer_sees_the_sources_that_are_there(spec, seen, slots):
    """All other weights are 0."""
    random = np.random.default_rng(0)
    start = jax.eval_shape(sublayer_of(spec, 4, 6).start, jnp.ones((1, 2, 4)))[0]
    streams = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), jnp.float32), start)

    @jax.jit
    def weights(sublayer):
        link = sublayer_of(spec, 4, 6, sublayer)
        params = link.init(jax.random.key(0), streams, method="coefficients")
        params = jax.tree.map(lambda a: a + 0.3, params)
        return link.source_weights(link.apply(params, streams, method="coefficients"))

    for sublayer, count in enumerate(seen):
        found = np.asarray(weights(jnp.int32(sublayer)))
        assert found.shape == (slots, 1, 2)
        np.testing.assert_array_equal((found != 0).all((1, 2)), np.arange(slots) < count)
        np.testing.assert_array_equal((found != 0).any((1, 2)), np.arange(slots) < count)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_heads_read_groups_of_neighbouring_channels(heads):
    random = np.random.default_rng(0)
    V, w = (np.float32(random.normal(size=shape)) for shape in ((5, 6), 6))
    weights = attention_weights(jnp.asarray(V.reshape(1, -1)), jnp.asarray(w), 4, 1e-20, heads)
    assert weights.shape == (heads, 5, 1)
    found = read_heads(jnp.asarray(V.reshape(1, -1)), weights)[0]
    assert_close(found, oracles_family.attention_over_depth(np.float64(V), np.float64(w), 4, heads))


def test_heads_must_divide_the_width():
    for kind in ("attnres_block", "delta_attnres"):
        with pytest.raises(InputError, match=r"connection.heads is 3, and model.width 16 is no multiple of it; choose"):
            jax.eval_shape(Decoder(decoder_of(f"{kind}:heads=3")).init, jax.random.key(0), TOKENS)
