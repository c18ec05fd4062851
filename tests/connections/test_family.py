"""The wider family against float64 loops, forward and gradients, and what each kind promises."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, oracles_family
from support.decoders import MODEL, TOKENS, logits_of, randomized
from support.tolerances import STEP_ZERO, assert_close

from mhc_jax import connections
from mhc_jax.connections.circulant import circulant_mixing
from mhc_jax.connections.kromhc import kronecker_mixing
from mhc_jax.connections.mhc_lite import permutation_mixing
from mhc_jax.diagnostics import summarize
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder
from mhc_jax.plots.style import LOOKS

C, L, SUBLAYER = 3, 6, 3
GRADIENT = 1e-5
"""float32 gradients against central differences of the float64 oracle, whose own error is about 1e-8."""
CASES = [
    ("scalar_gated", {}),
    ("identity:num_streams=2", {}),
    ("identity:eps_convention=v4", {"eps": (1e-6, 1e-6, 0.0)}),
    ("identity:eps_convention=hy_v4", {"eps": (1e-6, 1e-6, 1e-6)}),
    ("mhc_lite:num_streams=2", {}),
    ("mhc_lite:num_streams=4", {}),
    ("mhc_lite:num_streams=5", {}),
    ("kromhc:num_streams=2", {}),
    ("kromhc:num_streams=8", {}),
    ("circulant:num_streams=2", {"g": 4.0 / (2 * L)}),
    ("circulant:num_streams=5:beta=2.5", {"g": 2.5 / (2 * L)}),
    ("single_pass:num_streams=2", {}),
    ("single_pass:num_streams=4", {}),
    ("gated:rank=2:num_streams=3", {}),
    ("attnres_block:block_size=2", {"sublayer": SUBLAYER, "block_size": 2}),
    ("attnres_block:block_size=1", {"sublayer": SUBLAYER, "block_size": 1}),
    ("attnres_block:block_size=3", {"sublayer": SUBLAYER, "block_size": 3}),
]


def sublayer_of(spec, sublayer=SUBLAYER):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


@pytest.mark.parametrize(("spec", "settings"), CASES, ids=[spec for spec, _ in CASES])
def test_step_and_gradients_against_the_oracle(spec, settings):
    """(h, x') of one token, and the gradients of a random sum of both for streams, branch output and every parameter."""
    link = sublayer_of(spec)
    kind = spec.split(":")[0]
    state, _ = sublayer_of(spec, None).start(jnp.ones((1, 1, C)))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jax.random.normal(jax.random.key(k), leaf.shape) for k, leaf in enumerate(leaves)]
    y = jax.random.normal(jax.random.key(9), (1, 1, C))
    params = randomized(link.init(jax.random.key(0), tree.unflatten(leaves), method="coefficients"), seed=4)["params"]

    def ours(x, y, params):
        streams = tree.unflatten([x, *leaves[1:]])
        c = link.apply({"params": params}, streams, method="coefficients")
        h = link.apply({"params": params}, streams, c, method="read")
        return h[0, 0], jax.tree.leaves(link.apply({"params": params}, streams, c, y, method="write"))[0][0, 0]

    if kind == "single_pass":
        settings = {"pre": np.asarray(leaves[1][:, 0, 0], np.float64)}
    rows = leaves[0].size // C
    to64 = [np.asarray(a, np.float64) for a in (leaves[0].reshape(rows, C), y.reshape(C))]
    names = sorted(params)
    values = [np.asarray(params[name], np.float64) for name in names]

    def oracle(x, y, *values):
        h, out = oracles_family.STEP[kind](x, y, dict(zip(names, values, strict=True)), **settings)
        return h, out.reshape(-1)

    expected = oracle(*to64, *values)
    weights = [np.random.default_rng(k).normal(size=e.shape).astype(np.float32) for k, e in enumerate(expected)]
    actual = jax.jit(ours)(leaves[0], y, params)
    for name, a, e in zip(("h", "x'"), actual, expected, strict=True):
        assert_close(a, e, what=name)

    grads = jax.jit(jax.grad(lambda *a: sum((o * w).sum() for o, w in zip(ours(*a), weights, strict=True)), (0, 1, 2)))(
        leaves[0], y, params
    )
    numeric = oracles.numerical_gradient(
        lambda *a: sum((o * w).sum() for o, w in zip(oracle(*a), weights, strict=True)), [*to64, *values]
    )
    flat = [grads[0], grads[1], *(grads[2][name] for name in names)]
    for name, g, e in zip(["x", "y", *names], flat, numeric, strict=True):
        if kind == "single_pass" and name in ("phi", "alpha", "bias"):
            # A_l is read by the next sub-layer; its columns have no gradient in this step, in the oracle neither.
            assert np.abs(e).max() > 0
        assert_close(np.asarray(g).reshape(e.shape), e, GRADIENT, f"gradient of {name}")


def test_hy_v4_adds_eps_to_both_gates():
    """Seen where the sigmoids vanish; elsewhere 1e-6 is below float32's tolerance."""
    link = sublayer_of("identity:eps_convention=hy_v4:num_streams=2")
    params = {"phi": jnp.zeros((2 * C, 4)), "alpha": jnp.ones(2), "bias": jnp.full(4, -40.0)}
    c = link.apply({"params": params}, jnp.ones((1, 1, 2 * C)), method="coefficients")
    np.testing.assert_allclose([c.pre, c.post], 1e-6, rtol=1e-5)


MIXINGS = [
    *((f"mhc_lite {n}", lambda z, n=n: permutation_mixing(z, n), int(np.prod(range(1, n + 1)))) for n in (2, 3, 4, 5)),
    *((f"kromhc {n}", kronecker_mixing, 2 * (n.bit_length() - 1)) for n in (2, 4, 8, 16)),
    *((f"circulant {n}", lambda z: circulant_mixing(z, 0.7), n) for n in (2, 3, 4, 8)),
]


@pytest.mark.parametrize(("mixing", "k"), [m[1:] for m in MIXINGS], ids=[m[0] for m in MIXINGS])
def test_exactly_doubly_stochastic(mixing, k):
    logits = 8 * jax.random.normal(jax.random.key(0), (k, 50))
    H = np.asarray(mixing(logits))
    assert (H >= 0).all()
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-6)
    assert np.abs(H - H[..., :1]).max() > 0.1, "it depends on the logits"


def test_every_permutation_is_reached():
    """Logit k of mhc_lite alone gives permutation k; of kromhc, each factor's second logit swaps its bit."""
    logits = 100 * jnp.eye(6)
    H = np.asarray(permutation_mixing(logits, 3))
    orders = [tuple(H[..., k].argmax(1)) for k in range(6)]
    assert orders == list(itertools.permutations(range(3)))
    swapped = np.asarray(kronecker_mixing(jnp.asarray([100.0, 0, 0, 100])))
    np.testing.assert_allclose(swapped, np.kron(np.eye(2), [[0, 1], [1, 0]]), atol=1e-6)


def test_products_of_circulants_are_circulant():
    A, B = (np.asarray(circulant_mixing(jax.random.normal(jax.random.key(k), (5,)), 0.4)) for k in (0, 1))
    np.testing.assert_allclose(A @ B, B @ A, atol=1e-6)


def test_circulant_mixes_less_in_a_deeper_decoder():
    config = connections.parse("circulant:num_streams=2")
    H = []
    for depth in (4, 40):
        link = connections.connection_module(config)(config, C, depth, 0)
        x = jnp.ones((1, 1, 2 * C))
        c, _ = link.init_with_output(jax.random.key(0), x, method="coefficients")
        H.append(float(c.res[0, 1, 0, 0]))
    np.testing.assert_allclose(H, [4 / 8 / 2, 4 / 80 / 2], rtol=1e-6)
    shallow = connections.connection_module(config)(dataclasses.replace(config, beta=9.0), C, 4, 0)
    with pytest.raises(InputError, match=r"connection.beta is 9.0; with 4 sub-layers g = beta / 8 must not exceed 1"):
        shallow.init(jax.random.key(0), jnp.ones((1, 1, 2 * C)), method="coefficients")


def test_single_pass_reads_with_the_mix_of_the_sublayer_before():
    """Moving A of sub-layer 2 leaves its own read alone and moves that of sub-layer 3; the first read is stream 0."""
    spec = "single_pass:init=paper:num_streams=2"
    first, second = sublayer_of(spec, 2), sublayer_of(spec, 3)
    streams, _ = sublayer_of(spec, None).start(jax.random.normal(jax.random.key(0), (1, 4, C)))
    streams = streams._replace(x=jax.random.normal(jax.random.key(1), streams.x.shape))
    y = jax.random.normal(jax.random.key(2), (1, 4, C))
    params = randomized(first.init(jax.random.key(3), streams, method="coefficients"))
    moved = jax.tree.map(jnp.array, params)
    moved["params"]["bias"] = moved["params"]["bias"].at[:2].add(jnp.array([1.0, -1.0]))

    def reads(own):
        at_first = first.apply(own, streams, method="coefficients")
        h1 = first.apply(own, streams, at_first, method="read")
        _, _, h2 = second.apply(params, streams, at_first, y, method="write_read")
        return h1, h2

    base, other = reads(params), reads(moved)
    np.testing.assert_array_equal(base[0], streams.x[..., :C])
    np.testing.assert_array_equal(base[0], other[0])
    assert float(jnp.abs(base[1] - other[1]).max()) > 1e-2


def test_single_pass_keeps_the_meaning_of_home_streams():
    """The read of sub-layer l favours stream l mod n, as mHC's does, though sub-layer l - 1 holds it."""
    _, params = logits_of("single_pass:init=paper")
    biases = params["params"]["layers"]["mlp_connection"]["bias"][:, :4]
    np.testing.assert_array_equal(biases.argmax(-1), [2, 0, 2])  # sub-layers 1, 3, 5 predict for 2, 4, 6


def test_attnres_block_is_the_mean_of_the_sources_at_zero():
    for sublayer, seen in ((0, 1), (1, 2), (2, 2), (3, 3), (4, 3), (5, 4)):
        link = sublayer_of("attnres_block:block_size=2", sublayer)
        V = jax.random.normal(jax.random.key(0), (1, 2, link.slots * C))
        c, params = link.init_with_output(jax.random.key(0), V, method="coefficients")
        h = link.apply(params, V, c, method="read")
        sources = np.asarray(V, np.float64).reshape(1, 2, -1, C)[:, :, :seen]
        assert_close(h, sources.mean(2), what=f"sub-layer {sublayer}")


PRE_NORM = [
    "scalar_gated",
    "attnres_block",
    "identity",
    "identity:num_streams=1",
    "identity:num_streams=2",
    "mhc_lite",
    "kromhc",
    "circulant",
    "single_pass",
    "single_pass:num_streams=1",
    "mhc_lite:init=zeros",
    "identity:init=paper",
]


@pytest.mark.parametrize("spec", PRE_NORM)
def test_step_zero_equals_pre_norm(spec):
    assert float(jnp.abs(logits_of(spec)[0] - logits_of("residual")[0]).max()) <= STEP_ZERO


PRESET_KINDS = ("identity", "mhc_lite", "kromhc", "circulant", "single_pass")


@pytest.mark.parametrize("spec", [*(f"{kind}:init=home" for kind in PRESET_KINDS), "gated"])
def test_step_zero_with_broken_symmetry_is_not_pre_norm(spec):
    """`home` and the random gates of `gated` tell the streams apart from the start."""
    assert float(jnp.abs(logits_of(spec)[0] - logits_of("residual")[0]).max()) > 1e-4


def test_identity_is_mhc_without_mixing():
    """A fair comparison: same initial H_pre and H_post, and mhc:disable=res is the same function."""
    logits, identity = logits_of("identity:init=home")
    _, mhc = logits_of("mhc:init=home")
    for name in ("attention_connection", "mlp_connection"):
        own, other = (p["params"]["layers"][name] for p in (identity, mhc))
        np.testing.assert_array_equal(own["bias"], other["bias"][:, :8])
    np.testing.assert_array_equal(logits, logits_of("mhc:init=home:disable=res")[0])


@pytest.mark.parametrize("kind", connections.KINDS)
def test_every_kind_gives_the_diagnostics(kind):
    config = dataclasses.replace(MODEL, connection=connections.parse(kind))
    params = randomized(logits_of(kind)[1])
    _, collected = jax.jit(lambda p: Decoder(config).apply(p, TOKENS, 5))(params)
    n = config.connection.num_streams
    assert collected["res"].shape == (6, 5, n, n)
    record = summarize(collected)
    assert record["stream_rms"].shape == (6, n)
    assert all(np.isfinite(v).all() for v in record.values())
    if kind in ("identity", "mhc_lite", "kromhc", "circulant", "gated", "attnres_block"):
        np.testing.assert_allclose(record["composite_forward"], 1, atol=1e-5)
        np.testing.assert_allclose(record["composite_backward"], 1, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("scalar_gated:num_streams=2", "has one stream"),
        ("scalar_gated:disable=post+res", "nothing of `scalar_gated` is left"),
        ("scalar_gated:exit=head", "connection.exit is 'head'"),
        ("identity:disable=res", "'res'; it must be one of 'pre', 'post'"),
        ("identity:disable=pre+post", "nothing of `identity` is left"),
        ("identity:num_streams=1:init=home", "`identity` is a gated residual at most"),
        ("mhc:eps_convention=hy_v4", "connection.eps_convention is 'hy_v4'"),
        ("mhc_lite:num_streams=6", "6! = 720 permutations.*use `kromhc`"),
        ("mhc_lite:num_streams=1", "needs 2 to 5"),
        ("kromhc:num_streams=6", "a power of two from 2 on: use 4 or 8"),
        ("kromhc:num_streams=1", "a power of two from 2 on: use 2 or 2"),
        ("circulant:beta=0", "kind 'identity' has no mixing"),
        ("circulant:num_streams=1", "needs 2 or more"),
        ("single_pass:disable=pre", "use `mhc:disable=pre`"),
        ("mhc:exit=last_read", "connection.exit is 'last_read'"),
        ("gated:num_streams=1", "needs 2 or more"),
        ("gated:rank=0", "at least 1"),
        ("gated:init_std=0", "no gradient"),
        ("gated:disable=pre", "share their norm"),
        ("attnres_block:num_streams=4", "set block_size"),
        ("attnres_block:block_size=0", "at least 1"),
        ("attnres_block:exit=sum", "connection.exit is 'sum'"),
    ],
)
def test_refused_settings(spec, words):
    with pytest.raises(InputError, match=words):
        connections.parse(spec)


def test_every_kind_has_a_look_of_its_own():
    looks = [LOOKS[kind] for kind in connections.KINDS]
    assert len({(color, dashes) for color, dashes, _ in looks}) == len(looks)
    assert len({marker for *_, marker in looks}) == len(looks)
