"""Every kind but `residual` against float64 loops, forward and gradients, and the properties that its docstring promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, oracles_family
from support.decoders import OPTIMIZED, drawn, logits_of
from support.golden_values import load
from support.thinned import thin
from support.tolerances import GOLDEN, ORACLE_GRADIENT, SLOPES, assert_close

from mhc_jax import connections
from mhc_jax.connections.cayley import cayley
from mhc_jax.connections.circulant import circulant_mixing
from mhc_jax.connections.go_mhc import orthostochastic_mixing
from mhc_jax.connections.kromhc import kronecker_mixing
from mhc_jax.connections.mhc_lite import permutation_mixing
from mhc_jax.errors import InputError
from mhc_jax.wrappers.wiring import Wiring

C, L, SUBLAYER = 3, 6, 3
CASES = [
    *((f"hc:num_streams={n}:tanh={tanh}", {"tanh": tanh}) for n in (1, 2, 3, 4, 5, 8) for tanh in (True, False)),
    ("mhc:num_streams=3:t_max=1", {"t_max": 1}),
    ("mhc:num_streams=4:t_max=3", {"t_max": 3}),
    ("mhc:num_streams=3:t_max=2:write_rank=3", {"t_max": 2, "rank": 3}),
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
    ("diagonal:num_streams=3", {}),
    ("identity_mix:num_streams=3:t_max=3", {"t_max": 3}),
    ("go_mhc:num_streams=2", {"s": 2}),
    ("go_mhc:num_streams=4", {"s": 2}),
    ("go_mhc:num_streams=3:s=1", {"s": 1}),
    ("lanes", {"sublayer": SUBLAYER}),
    ("single_pass:num_streams=2", {}),
    ("single_pass:num_streams=4", {}),
    ("gated:rank=2:num_streams=3", {}),
    ("attnres_block:block_size=2", {"sublayer": SUBLAYER, "block_size": 2}),
    ("attnres_block:block_size=1", {"sublayer": SUBLAYER, "block_size": 1}),
    ("attnres_block:block_size=3", {"sublayer": SUBLAYER, "block_size": 3}),
    ("attnres_block:block_size=2:heads=3", {"sublayer": SUBLAYER, "block_size": 2, "heads": 3}),
    ("delta_attnres:block_size=1:heads=3", {"sublayer": SUBLAYER, "block_size": 1, "heads": 3}),
    ("delta_attnres:block_size=2", {"sublayer": SUBLAYER, "block_size": 2}),
    ("mudd:block_size=1", {"sublayer": SUBLAYER, "block_size": 1}),
    ("mudd:block_size=3:norms=False", {"sublayer": SUBLAYER, "block_size": 3}),
    ("mudd:block_size=2", {"sublayer": SUBLAYER, "block_size": 2}),
]


def sublayer_of(spec, sublayer=SUBLAYER):
    config = connections.parse(spec)
    return connections.connection_module(config)(config, C, L, sublayer)


LONG = (
    "mhc_lite:num_streams=5",
    "kromhc:num_streams=8",
    "go_mhc:num_streams=4",
    *(f"hc:num_streams={n}:tanh=False" for n in (1, 3, 5)),
)
"""Cases left out of the fast suite, because the oracle differentiates many parameters and shorter cases cover the same code."""


@pytest.mark.parametrize(
    ("spec", "settings"),
    [pytest.param(*case, id=case[0], marks=pytest.mark.full if case[0] in LONG else ()) for case in CASES],
)
def test_step_and_gradients_against_the_oracle(spec, settings):
    """The read h and the written x' of one token, and the gradients of a random sum of both for all inputs and parameters."""
    link, kind = sublayer_of(spec), spec.split(":")[0]
    random = np.random.default_rng(4)
    normal = lambda shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    leaves, tree = jax.tree.flatten(jax.eval_shape(sublayer_of(spec, None).start, jnp.ones((1, 1, C)))[0])
    leaves = [jnp.asarray(normal(leaf.shape)) for leaf in leaves]
    y = normal((1, 1, C))
    params = drawn(functools.partial(link.init, method="coefficients"), tree.unflatten(leaves), seed=4)["params"]

    if kind == "single_pass":
        settings = {"pre": np.asarray(leaves[1][:, 0, 0], np.float64)}
    names, widths = sorted(params), [leaf.size for leaf in (leaves[:1] if kind == "single_pass" else leaves)]
    joined = jnp.concatenate([leaf.ravel() for leaf in leaves[: len(widths)]])
    given = [np.asarray(a, np.float64) for a in (joined.reshape(-1, C), y[0, 0], *(params[name] for name in names))]

    def oracle(x, y, *values):
        h, out = oracles_family.STEP[kind](x, y, dict(zip(names, values, strict=True)), **settings)
        return h, out.reshape(-1)

    expected = oracle(*given)
    weights = [normal(e.shape) for e in expected]

    def ours(x, y, params):
        parts = jnp.split(x, np.cumsum(widths)[:-1])
        parts = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=False)]
        streams = tree.unflatten([*parts, *leaves[len(widths) :]])
        c = link.apply({"params": params}, streams, method="coefficients")
        h = link.apply({"params": params}, streams, c, method="read")[0, 0]
        written = jax.tree.leaves(link.apply({"params": params}, streams, c, y, method="write"))
        out = jnp.concatenate([leaf.ravel() for leaf in written[: len(widths)]])
        return (h * weights[0]).sum() + (out * weights[1]).sum(), (h, out)

    grads, actual = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(joined, y, params)
    for name, a, e in zip(("h", "x'"), actual, expected, strict=True):
        assert_close(a, e, what=name)
    numeric = oracles.numerical_gradient(
        lambda *a: sum((o * w).sum() for o, w in zip(oracle(*a), weights, strict=True)), given
    )
    flat = [grads[0], grads[1], *(grads[2][name] for name in names)]
    for name, g, e in zip(["x", "y", *names], flat, numeric, strict=True):
        if kind == "single_pass" and name in ("phi", "alpha", "bias"):
            # A_l is read by the next sub-layer; its columns have no gradient in this step, in the oracle neither.
            assert np.abs(e).max() > 0
        assert_close(np.asarray(g).reshape(e.shape), e, ORACLE_GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize(("convention", "eps"), [("paper", (0, 0)), ("v4", (1e-6, 0)), ("hy_v4", (1e-6, 1e-6))])
def test_hy_v4_adds_eps_to_both_gates(convention, eps):
    """v4 adds eps to H_pre only.  The sigmoids vanish here, because 1e-6 beside them is below the tolerance of float32."""
    link = sublayer_of(f"identity:eps_convention={convention}:num_streams=2")
    params = {"phi": jnp.zeros((2 * C, 4)), "alpha": jnp.ones(2), "bias": jnp.full(4, -40.0)}
    c = link.apply({"params": params}, jnp.ones((1, 1, 2 * C)), method="coefficients")
    for gate, expected in zip((c.pre, c.post), eps, strict=True):
        np.testing.assert_allclose(gate, expected, rtol=1e-5, atol=1e-16)


STARTS = [
    ("mhc_lite", lambda: oracles_family.permutation_mixing([0.0] + [-8.0] * 23, 4)),
    ("mhc_lite:num_streams=3:init=zeros", lambda: np.full((3, 3), 1 / 3)),
    ("kromhc", lambda: oracles_family.kronecker_mixing([0.0, -8.0] * 2, 4)),
    ("kromhc:init=zeros", lambda: np.full((4, 4), 1 / 4)),
    ("circulant:num_streams=3", lambda: oracles_family.circulant_mixing([0.0] * 3, 3, 4.0 / (2 * L))),
    ("diagonal:num_streams=2", lambda: np.eye(2) / (1 + np.exp(-8.0))),
    ("diagonal:init=zeros", lambda: np.eye(4) / 2),
    ("identity_mix:num_streams=2:init=zeros", lambda: 0.99 * np.eye(2) + 0.005),
    ("circulant:num_streams=2:beta=0.6", lambda: [[0.975, 0.025], [0.025, 0.975]]),  # g = 0.05
]


@pytest.mark.parametrize(("spec", "expected"), STARTS, ids=[spec for spec, _ in STARTS])
def test_h_res_at_the_start(spec, expected):
    link = sublayer_of(spec)
    x = jnp.ones((1, 1, link.config.num_streams * C))
    c, _ = jax.jit(lambda: link.init_with_output(jax.random.key(0), x, method="coefficients"))()
    assert_close(c.res[..., 0, 0], expected())


def test_diagnostics_of_gated_see_what_its_read_applies():
    """With up = 0 all gates are 1/2, so that the read is a mix of the normed streams with pre."""
    link = sublayer_of("gated:rank=2:num_streams=3")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3 * C)), jnp.float32)
    params = drawn(functools.partial(link.init, method="coefficients"), x)["params"]
    params |= {"up": jnp.zeros_like(params["up"]), "norm": jnp.ones(3 * C)}
    c = link.apply({"params": params}, x, method="coefficients")
    normed = [stream / oracles.rms(stream, 1e-6) for stream in np.asarray(x, np.float64).reshape(3, C)]
    h = link.apply({"params": params}, x, c, method="read")
    assert_close(h[0, 0], oracles.read(np.array(normed), np.asarray(c.pre[:, 0, 0], np.float64)))


MIXINGS = [
    *((f"mhc_lite {n}", lambda z, n=n: permutation_mixing(z, n), int(np.prod(range(1, n + 1)))) for n in (2, 3, 4, 5)),
    *((f"kromhc {n}", kronecker_mixing, 2 * (n.bit_length() - 1)) for n in (2, 4, 8, 16)),
    *((f"circulant {n}", lambda z: circulant_mixing(z, 0.7), n) for n in (2, 3, 4, 8)),
    *((f"go_mhc {n}", lambda z, n=n: orthostochastic_mixing(z, n), n * (2 * n - 1)) for n in (2, 3)),
]


@pytest.mark.parametrize(("mixing", "k"), [m[1:] for m in MIXINGS], ids=[m[0] for m in MIXINGS])
def test_exactly_doubly_stochastic(mixing, k):
    H = np.asarray(jax.jit(mixing)(8 * np.random.default_rng(0).normal(size=(k, 50)).astype(np.float32)))
    assert (H >= 0).all()
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-6)
    assert np.abs(H - H[..., :1]).max() > 0.1, "it depends on the logits"


def test_every_permutation_is_reached():
    """One large logit k of mhc_lite gives permutation k; the second logit of each factor of kromhc swaps its two halves."""
    logits = 100 * jnp.eye(6)
    H = np.asarray(permutation_mixing(logits, 3))
    orders = [tuple(H[..., k].argmax(1)) for k in range(6)]
    assert orders == list(itertools.permutations(range(3)))
    swapped = np.asarray(kronecker_mixing(jnp.asarray([100.0, 0, 0, 100])))
    np.testing.assert_allclose(swapped, np.kron(np.eye(2), [[0, 1], [1, 0]]), atol=1e-6)


def test_circulant_refuses_to_mix_more_than_fully():
    """A beta that fits a deep decoder may exceed 2L in a shallow one."""
    config = connections.parse("circulant:num_streams=2:beta=9")
    shallow = connections.connection_module(config)(config, C, 4, 0)
    with pytest.raises(InputError, match=r"connection.beta is 9.0; with 4 sub-layers g = beta / 8 must not exceed 1"):
        shallow.init(jax.random.key(0), jnp.ones((1, 1, 2 * C)), method="coefficients")


def test_single_pass_reads_with_the_mix_of_the_sublayer_before():
    """Moving A of a sub-layer leaves its read alone and moves that of the next; the first read is stream 0."""
    spec = "single_pass:init=paper:num_streams=2:t_max=2"
    first, second = sublayer_of(spec, 2), sublayer_of(spec, 3)
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=(1, 4, width)), jnp.float32) for width in (2 * C, C))
    streams = sublayer_of(spec, None).start(y)[0]._replace(x=x)
    params = drawn(functools.partial(first.init, method="coefficients"), streams)
    bias = params["params"]["bias"]
    moved = {"params": {**params["params"], "bias": bias.at[:2].add(jnp.array([1.0, -1.0]))}}

    @jax.jit
    def reads(variables):
        at_first = first.apply(variables, streams, method="coefficients")
        h1 = first.apply(variables, streams, at_first, method="read")
        _, _, h2 = second.apply(params, streams, at_first, y, method="write_read")
        return h1, h2

    before, after = reads(params), reads(moved)
    np.testing.assert_array_equal(before[0], x[..., :C])
    np.testing.assert_array_equal(before[0], after[0])
    assert float(np.abs(before[1] - after[1]).max()) > 1e-2


def test_attnres_block_is_the_mean_of_the_sources_at_zero():
    V = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4 * C)), jnp.float32)
    sources = np.asarray(V, np.float64).reshape(1, 2, 4, C)

    @jax.jit
    def read_of(sublayer):
        link = sublayer_of("attnres_block:block_size=2", sublayer)
        c, params = link.init_with_output(jax.random.key(0), V, method="coefficients")
        return link.apply(params, V, c, method="read")

    for sublayer, seen in ((0, 1), (1, 2), (2, 2), (3, 3), (4, 3), (5, 4)):
        assert_close(read_of(jnp.int32(sublayer)), sources[:, :, :seen].mean(2), what=f"sub-layer {sublayer + 1}")


def test_identity_is_mhc_without_mixing():
    """`identity` and `mhc` have the same initial H_pre and H_post, and `mhc:disable=res` is the same function as `identity`."""
    logits, identity = logits_of("identity:init=home")
    _, mhc = logits_of("mhc:t_max=2:init=home")
    for name in ("attention_connection", "mlp_connection"):
        np.testing.assert_array_equal(identity["layers"][name]["bias"], mhc["layers"][name]["bias"][:, :8])
    np.testing.assert_array_equal(logits, logits_of("mhc:init=home:disable=res")[0])


def extreme_logits(m, seed=0):
    """Logits [m (m - 1) / 2, tokens] of go_mhc in [-80, 80]: random ones, few that are not 0, of many sizes, all alike."""
    random, (i, j) = np.random.default_rng(seed), np.triu_indices(m, 1)
    k = len(i)
    columns = [
        random.uniform(-80, 80, (k, 20)),
        *(random.choice([-80, *[0] * zeros, 80], (k, 20)) for zeros in (0, 1, 8)),
    ]
    columns += [80 * 10.0 ** random.uniform(-6, 0, (k, 20)) * random.choice([-1, 1], (k, 20))]
    columns += [z[:, None] for z in (80 + 0 * i, (i + j) % 2 * 80, (i == 0) * 80, (j == m - 1) * 80, (j > i + 1) * -80)]
    return np.concatenate(columns, 1).astype(np.float32)


EXACT = [*((n, 2) for n in range(2, 17)), (4, 1), (4, 3)]


@pytest.mark.parametrize(("n", "s"), thin(EXACT, [(4, 2), (16, 2)].__contains__))
def test_go_mhc_is_exact_at_large_logits(n, s):
    """Sums of rows and columns within 1e-6, H_res of the float64 oracle within 1e-5, and finite gradients."""
    z = extreme_logits(n * s)
    weights = np.random.default_rng(1).normal(size=(n, n, 1)).astype(np.float32)

    def loss(z):
        H = orthostochastic_mixing(z, n)
        return (H * weights).sum(), H

    gradient, H = jax.jit(jax.grad(loss, has_aux=True))(z)
    assert np.isfinite(gradient).all()
    H = np.asarray(H, np.float64)
    assert (H >= 0).all()
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-6)
    expected = [oracles_family.orthostochastic_mixing(column, n, s) for column in z.T.astype(np.float64)]
    np.testing.assert_allclose(np.moveaxis(H, -1, 0), expected, atol=1e-5)


def test_go_mhc_is_exact_for_many_tokens_and_any_logits():
    """In an optimized program: XLA's CPU backend lost digits of a sum over an axis from some 20,000 tokens on.

    The last 1,000 tokens have logits up to 1e30.
    """
    random = np.random.default_rng(0)
    z = (10 ** random.uniform(0, 30, 20_000)[None] * random.uniform(-1, 1, (28, 20_000))).astype(np.float32)
    z[:, :19_000] = random.uniform(-80, 80, (28, 19_000))
    program = jax.jit(lambda z: orthostochastic_mixing(z, 4)).lower(z).compile(compiler_options=OPTIMIZED)
    H = np.asarray(program(z))
    np.testing.assert_allclose(H.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-6)


def test_gradient_of_cayley_at_large_entries():
    """Along a random direction, against central differences in float64, at entries up to 80."""
    random, m = np.random.default_rng(0), 5
    upper = np.triu(random.uniform(-80, 80, (m, m)), 1)
    A, direction, weights = upper - upper.T, np.triu(random.normal(size=(m, m)), 1), random.normal(size=(m, m))
    direction = direction - direction.T

    def value(t):
        B = A + t * direction
        return (weights * ((np.eye(m) - B) @ np.linalg.inv(np.eye(m) + B))).sum()

    gradient = jax.grad(lambda A: (cayley(A) * weights.astype(np.float32)).sum())(jnp.asarray(A, jnp.float32))
    slope = (np.asarray(gradient, np.float64) * direction).sum()
    assert_close(slope, (value(1e-4) - value(-1e-4)) / 2e-4, SLOPES, terms=np.asarray(gradient) * direction)


def test_lanes_are_a_model_written_by_hand():
    """Four branches between an entry and an exit, in NumPy: two lanes, attention on the first, feed-forward on the second."""
    wiring = Wiring("lanes", C, 4)
    random = np.random.default_rng(0)
    x, w = random.normal(size=(2, 5, C)), 1 + 0.3 * random.normal(size=(4, 2))
    params = {"ends": {}, "branches": {"post": jnp.asarray(w, jnp.float32)}}
    found = wiring.apply(params, [jnp.tanh, jnp.sin, jnp.cos, jnp.tanh], jnp.asarray(x, jnp.float32))
    attention, feed_forward = np.array(x), np.array(x)
    for layer, (attend, feed) in enumerate([(np.tanh, np.sin), (np.cos, np.tanh)]):
        y = attend(attention)
        attention, feed_forward = attention + w[2 * layer, 0] * y, feed_forward + w[2 * layer, 1] * y
        y = feed(feed_forward)
        attention, feed_forward = attention + w[2 * layer + 1, 0] * y, feed_forward + w[2 * layer + 1, 1] * y
    assert_close(found, (attention + feed_forward) / 2)


SIXTEEN = [("diagonal", {}), ("identity_mix:t_max=3", {"t_max": 3}), ("go_mhc", {"s": 2})]
SIXTEEN += [("mhc:t_max=3:write_rank=4", {"t_max": 3, "rank": 4})]


@pytest.mark.full
@pytest.mark.parametrize(("spec", "settings"), SIXTEEN, ids=[spec for spec, _ in SIXTEEN])
def test_sixteen_streams(spec, settings):
    """A step of one token, and the slope of a random sum of it along a random direction of streams, output and parameters."""
    link, n = sublayer_of(f"{spec}:num_streams=16"), 16
    random = np.random.default_rng(5)
    x, y = random.normal(size=(1, 1, n * C)).astype(np.float32), random.normal(size=(1, 1, C)).astype(np.float32)
    params = drawn(functools.partial(link.init, method="coefficients"), x, seed=5)["params"]
    given = {**params, "x": x, "y": y}
    direction = {name: random.normal(size=a.shape).astype(np.float32) for name, a in given.items()}
    weights = random.normal(size=(n + 1, C)).astype(np.float32)

    def ours(given):
        p = {"params": {name: given[name] for name in params}}
        c = link.apply(p, given["x"], method="coefficients")
        h = link.apply(p, given["x"], c, method="read")[0]
        out = link.apply(p, given["x"], c, given["y"], method="write").reshape(n, C)
        out = jnp.concatenate([h, out])
        return (out * weights).sum(), out

    def oracle(t):
        moved = {name: np.asarray(a, np.float64) + t * direction[name] for name, a in given.items()}
        h, out = oracles_family.STEP[link.config.kind](moved["x"].reshape(n, C), moved["y"][0, 0], moved, **settings)
        return np.concatenate([h[None], out])

    gradient, out = jax.jit(jax.grad(ours, has_aux=True))(given)
    assert_close(out, oracle(0.0))
    terms = np.concatenate([np.ravel(np.asarray(gradient[name]) * direction[name]) for name in given])
    slope = ((oracle(1e-6) - oracle(-1e-6)) * weights).sum() / 2e-6
    assert_close(terms.sum(dtype=np.float64), slope, SLOPES, terms=terms)


@pytest.mark.parametrize(("n", "s"), [(2, 1), (4, 2), (8, 2)])
def test_go_mhc_is_that_of_its_authors(n, s):
    """Golden values of their notebook, which solves for the transpose of the paper's Q: our H_res of -A."""
    g = load(f"go_mhc_n{n}_s{s}")
    A = g["theta"] - g["theta"].swapaxes(1, 2)
    i, j = np.triu_indices(n * s, 1)
    H = orthostochastic_mixing(-A[:, i, j].T, n)
    np.testing.assert_allclose(np.moveaxis(H, -1, 0), g["H"], atol=1e-5)


def test_identity_mix_is_that_of_its_authors():
    """Golden values of their module.  Their H_res is applied transposed, and their gates are softmaxes of static logits."""
    g = {name: np.asarray(a) for name, a in load("identity_mix").items()}
    n, C = g["x"].shape[-2:]
    config = connections.parse(f"identity_mix:num_streams={n}:t_max={g['num_iters']}")
    link = connections.connection_module(config)(config, C, 2, 0)
    pre, post = (np.array(oracles_family.softmax(g[f"H_{part}_logits"][0])) for part in ("pre", "post"))
    logits = [np.log(pre / (1 - pre)), np.log(post / (2 - post)), (g["H_res_logits"].T / g["tau"]).ravel()]
    params = {"phi": np.zeros((n * C, n * n + 2 * n)), "alpha": np.ones(3), "bias": np.concatenate(logits)}
    params = {"params": jax.tree.map(jnp.float32, params | {"share_logit": g["H_res_alpha_logit"]})}
    x = jnp.asarray(g["x"].reshape(2, 5, -1))
    c = link.apply(params, x, method="coefficients")
    assert_close(link.apply(params, x, c, method="read"), g["h"], GOLDEN)
    x_out = link.apply(params, x, c, jnp.asarray(g["y"]), method="write")
    assert_close(x_out.reshape(g["x_out"].shape), g["x_out"], GOLDEN)
