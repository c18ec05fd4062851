"""Numbers of a diagnostics line equal float64 loops, oracles and values known by hand, up to the ends of the dtypes."""

import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.in_process import run_here
from support.thinned import thin
from support.tiny_runs import run_script, tiny, write_text
from support.tolerances import FP32_RELATIVE, assert_close

from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.data import load_data
from mhc_jax.diagnostics import STREAM_MEASURES, rank_one, root_mean_square, sample_sublayer, stream_measures, summarize
from mhc_jax.loop import train
from mhc_jax.runs import checkpoint
from mhc_jax.train_step import init_state, make_eval_step

measure = jax.jit(stream_measures)
U, V, W, Z = np.eye(4, 16)
"""Four orthogonal directions."""
DIRECTION = np.linspace(-1, 2, 16)


def measured(x, dtype=jnp.float32):
    """Return (signed cosine, absolute cosine, rank) of streams [n, C] of one token or [S, n, C] of S tokens."""
    x = jnp.asarray(np.asarray(x, np.float64).reshape(-1, *np.shape(x)[-2:]), dtype)
    values = measure(x)
    assert all(value.dtype == jnp.float32 for value in values.values())
    return [float(values[key]) for key in STREAM_MEASURES]


KNOWN = {
    "equal": ([U, U, U, U], (1, 1, 1)),
    "equal up to sign": ([U, U, U, -U], (0, 1, 1)),
    "equal up to scale": ([U, 2 * U, 1e-3 * U, 7 * U], (1, 1, 1)),
    "equal up to sign and scale": ([DIRECTION, 2 * DIRECTION, DIRECTION / 3, -5 * DIRECTION], (0, 1, 1)),
    "two pairs": ([U, U, V, V], (1 / 3, 1 / 3, 2)),
    "two pairs up to sign": ([U, -U, V, V], (0, 1 / 3, 2)),
    "orthogonal": ([U, V, W, Z], (0, 0, 4)),
    "orthogonal, norms 1 and 2": ([U, 2 * V], (0, 0, 25 / 17)),
    "60 degrees apart": ([U, U / 2 + np.sqrt(3) / 2 * V], (1 / 2, 1 / 2, 8 / 5)),
    "one outweighs the others": ([1e6 * U, V, W, Z], (0, 0, 1)),
    "one stream": ([U], (1, 1, 1)),
    "a zero stream": ([U, -U, 0 * U], (-1, 1, 1)),
    "one that is not zero": ([U, 0 * U, 0 * U], (1, 1, 1)),
    "tiny ones beside a zero": ([1e-30 * U, 1e-30 * V, 0 * U], (0, 0, 2)),
    "all zero": ([0 * U, 0 * U, 0 * U], (1, 1, 1)),
    "two tokens": ([[U, V], [U, -U]], (-1 / 2, 1 / 2, 3 / 2)),
    "a token of zeros beside another": ([[U, V], [0 * U, 0 * U]], (0, 0, 3 / 2)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_known_by_hand(name):
    streams, expected = KNOWN[name]
    np.testing.assert_allclose(measured(streams), expected, atol=FP32_RELATIVE)
    np.testing.assert_allclose(oracles.stream_measures(streams), expected, atol=1e-9)


DTYPES = {"float32": (1, 4), "bfloat16": (2,), "float16": (4,)}
"""Dtype to the numbers of streams that the fast suite tries it with."""


@pytest.mark.parametrize(
    ("dtype", "n"), thin(itertools.product(DTYPES, (1, 2, 4)), lambda case: case[1] in DTYPES[case[0]])
)
def test_random_streams_are_the_oracle(dtype, n):
    sizes = 10.0 ** np.random.default_rng(n).uniform(-2, 2, (5, n, 1))
    x = np.asarray(jnp.asarray(np.random.default_rng(n).normal(size=(5, n, 24)) * sizes, dtype), np.float64)
    assert_close(measured(x, dtype), oracles.stream_measures(x))


@pytest.mark.parametrize("size", [1e15, 1e38, 1e-19, 1e-30])
def test_size_changes_no_measure(size):
    """Squares of 1e38 and of 1e-30 leave float32; bfloat16 streams reach both."""
    x = np.asarray(jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (3, 4, 16)), jnp.bfloat16), np.float64)
    expected = oracles.stream_measures(x)
    for dtype in (jnp.float32, jnp.bfloat16):
        scaled = np.asarray(jnp.asarray(size * x, dtype), np.float64)
        assert_close(measured(scaled, dtype), oracles.stream_measures(scaled))
    mixed = x * np.array([1, size, 1, 1])[:, None]
    assert_close(measured(mixed), oracles.stream_measures(np.float32(mixed)))
    assert_close(measured(mixed)[:2], expected[:2])
    rms = jax.jit(root_mean_square, static_argnums=1)(jnp.asarray(size * x, jnp.float32), (0, 2))
    assert_close(np.asarray(rms, np.float64) / size, np.sqrt((x**2).mean((0, 2))))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_streams_that_are_not_finite_have_no_measure(bad):
    assert np.isnan(measured([[U, V], [U, bad * (V + 1)]])).all()
    assert not np.isfinite(root_mean_square(jnp.asarray([1, bad]), (0,)))


def test_rank_one_is_the_best_approximation_and_leaves_collapsed_streams_alone():
    x = np.random.default_rng(0).normal(size=(5, 4, 16)).astype(np.float32)
    found = np.asarray(rank_one(jnp.asarray(x.reshape(5, 64)), 4)).reshape(5, 4, 16)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(found, u[:, :, :1] * s[:, None, :1] @ v[:, :1], atol=2e-5)
    collapsed = (np.asarray([1, -2, 0.5, 3])[None, :, None] * x[:, :1]).astype(np.float32).reshape(5, 64)
    np.testing.assert_allclose(rank_one(jnp.asarray(collapsed), 4), collapsed, atol=1e-5)
    np.testing.assert_allclose(rank_one(jnp.asarray(1e30 * collapsed), 4), 1e30 * collapsed, rtol=1e-4, atol=1e25)


L, B, T, N, C = 5, 2, 6, 3, 4
SHOWN = [0, 3, 7, 11]
"""The sampled tokens: 4 of 12 at even distances, 0, 11/3, 22/3 and 11 rounded down."""


@pytest.fixture(scope="module")
def collected():
    """Return coefficients, streams and branch outputs of every sub-layer in float64, and what `sample_sublayer` keeps."""
    random = np.random.default_rng(0)
    raw = {
        "pre": random.uniform(0, 1, (L, N, B, T)),
        "post": random.uniform(0, 2, (L, N, B, T)),
        "res": np.eye(N)[:, :, None, None] + 0.3 * random.normal(size=(L, N, N, B, T)),
        "streams": random.normal(size=(L, B, T, N * C)) * np.repeat([1.0, 2.0, 5.0], C),
        "y": random.normal(size=(L, B, T, C)),
        "logits": random.normal(size=(L, 7, B, T)),
        "weights": random.normal(size=(L, 4, B, T)),
    }
    raw["res"][:, 0, 0] = 0.99 + random.choice([-0.001, 0.001], (L, B, T))
    raw = {key: np.float32(value) for key, value in raw.items()}

    @jax.jit
    def sampled(given):
        dense = given["pre"], given["post"], given["res"]
        link = types.SimpleNamespace(
            dense=lambda c, y: dense,
            flat=lambda streams: streams,
            mixing_logits=lambda streams: given["logits"],
            source_weights=lambda c: given["weights"],
        )
        return sample_sublayer(link, given["streams"], None, given["y"], len(SHOWN))

    rows = [sampled({key: value[l] for key, value in raw.items()}) for l in range(L)]
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: np.float64(value) for key, value in raw.items()}, stacked


def product(factors):
    """Multiply matrices by loops: the last factor times ... times the first."""
    out = np.eye(N)
    for factor in factors:
        out = np.array([[sum(factor[i, k] * out[k, j] for k in range(N)) for j in range(N)] for i in range(N)])
    return out


def gain(P):
    """max_i |sum_j P_ij|."""
    return max(abs(sum(row)) for row in P)


def norm(P):
    """max_i sum_j |P_ij|."""
    return max(sum(abs(entry) for entry in row) for row in P)


def entropy(P):
    """Mean entropy of the rows of |P|, over ln n."""
    shares = [abs(entry) / sum(abs(one) for one in row) for row in P for entry in row]
    return -sum(share * math.log(share) for share in shares) / N / math.log(N)


def test_gains_marginals_and_entropy(collected):
    raw, stacked = collected
    out = summarize(stacked)
    H = [[raw["res"][l].reshape(N, N, -1)[..., token] for l in range(L)] for token in SHOWN]
    mean_H = [sum(matrices) / len(SHOWN) for matrices in zip(*H, strict=True)]
    for l in range(L):
        single = [matrices[l] for matrices in H]
        up = [product(matrices[: l + 1]) for matrices in H]
        down = [product(matrices[l:]) for matrices in H]
        expected = {
            "single_forward": np.mean([gain(P) for P in single]),
            "single_backward": np.mean([gain(P.T) for P in single]),
            "composite_forward": np.mean([gain(P) for P in up]),
            "composite_backward": np.mean([gain(P.T) for P in down]),
            "composite_forward_max": max(gain(P) for P in up),
            "composite_backward_max": max(gain(P.T) for P in down),
            "composite_forward_norm": np.mean([norm(P) for P in up]),
            "composite_backward_norm": np.mean([norm(P.T) for P in down]),
            "composite_mean_forward": gain(product(mean_H[: l + 1])),
            "composite_mean_backward": gain(product(mean_H[l:]).T),
            "row_error": max(abs(sum(row) - 1) for P in single for row in P),
            "column_error": max(abs(sum(column) - 1) for P in single for column in P.T),
            "entropy": np.mean([entropy(P) for P in single]),
            "saturation": sum(entry > 0.99 for P in single for entry in P.flat) / (len(SHOWN) * N * N),
            "res_logit_min": min(raw["logits"][l].reshape(7, -1)[:, SHOWN].flat),
            "res_logit_max": max(raw["logits"][l].reshape(7, -1)[:, SHOWN].flat),
            "uniform_distance": np.mean([math.sqrt(sum((x - 1 / N) ** 2 for x in P.flat)) for P in up]),
        }
        for key, value in expected.items():
            assert out[key][l] == pytest.approx(value, rel=1e-6), (key, l)
        np.testing.assert_allclose(out["h_res"][l], mean_H[l], rtol=1e-6)


def test_reads_writes_and_streams(collected):
    """Means over sampled tokens, root mean squares of streams, signed cosines of pairs; branch outputs at every token."""
    raw, stacked = collected
    out = summarize(stacked)
    for l in range(L):
        for key in ("pre", "post"):
            shown = raw[key][l].reshape(N, -1)[:, SHOWN]
            np.testing.assert_allclose(out[f"h_{key}"][l], shown.mean(1), rtol=1e-6)
        shown = raw["weights"][l].reshape(4, -1)[:, SHOWN]
        np.testing.assert_allclose(out["depth_mixing"][l], shown.mean(1), rtol=1e-6)
        streams = raw["streams"][l].reshape(-1, N, C)[SHOWN]
        np.testing.assert_allclose(out["stream_rms"][l], np.sqrt((streams**2).mean((0, 2))), rtol=1e-6)
        assert out["branch_rms"][l] == pytest.approx(np.sqrt((raw["y"][l] ** 2).mean()), rel=1e-6)
        assert_close([out[key][l] for key in STREAM_MEASURES], oracles.stream_measures(streams))


def test_gains_beyond_float32_are_numbers():
    """Three matrices of 1e20: the gain of their product is 8e60."""
    shapes = {"pre": (3, 1, 2), "post": (3, 1, 2), "stream_rms": (3, 2), "branch_rms": (3,)}
    shapes |= dict.fromkeys(STREAM_MEASURES, (3,))
    given = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    out = summarize(given | {"res": np.full((3, 1, 2, 2), 1e20, np.float32)})
    one = 2 * float(np.float32(1e20))
    np.testing.assert_allclose(out["composite_forward"], [one, one**2, one**3], rtol=1e-12)
    np.testing.assert_allclose(out["composite_backward"], [one**3, one**2, one], rtol=1e-12)


def losses(out, config, params):
    """Return the losses that experiments/collapse.py prints: unchanged, and with streams of rank one from sub-layer l on."""
    found = {name: float(loss) for name, loss in re.findall(r"(unchanged|from \d) ([\d.]+)", out)}
    assert list(found) == ["unchanged", "from 1", "from 2", "from 3", "from 4"]
    step = jax.jit(make_eval_step(config))
    by_hand = [step(params, batch) for batch in load_data(config.data).validation_batches(2)]
    assert found["unchanged"] == pytest.approx(np.mean(by_hand), abs=1e-4)
    return found


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
    found = losses(out, config, params)
    assert status == 0
    assert found["from 1"] == found["from 2"], "no write comes before the first"
    assert len(set(found.values())) == 4, "the others are all different"


@pytest.mark.full
def test_losses_of_a_run(text, tmp_path):
    """HC's streams are one vector after two steps, so that the replacement changes nothing."""
    train(tiny(text, "hc", model={"num_layers": 2}, train={"steps": 2, "validate_every": 0}), tmp_path / "run")
    status, out, err = run_script("collapse", f"--checkpoint={tmp_path / 'run'}", "--batches=2")
    assert status == 0, err
    mapping, params = checkpoint.load_params(tmp_path / "run")
    found = losses(out, from_mapping(mapping), params)
    assert max(abs(loss - found["unchanged"]) for loss in found.values()) < 2e-4


def test_a_run_of_one_stream_is_refused(text, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_params", lambda folder: (to_mapping(tiny(text, "residual")), {}))
    status, _, err = run_here("collapse", "--checkpoint=run")
    assert status == 2
    assert "has one stream" in err
