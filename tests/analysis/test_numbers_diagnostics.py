"""Every number of a diagnostics line against float64 loops over tokens, sub-layers and entries."""

import itertools
import math
import types

import jax
import numpy as np
import pytest

from mhc_jax.diagnostics import STREAM_MEASURES, sample_sublayer, summarize

L, B, T, N, C = 5, 2, 6, 3, 4
SAMPLED = 4
SHOWN = [0, 3, 7, 11]
"""Of 12 tokens, 4 at even distances: 0, 11/3, 22/3 and 11, rounded down."""


@pytest.fixture(scope="module")
def collected():
    """Coefficients, streams and branch outputs of every sub-layer, float64, and what `sample_sublayer` keeps of them."""
    random = np.random.default_rng(0)
    raw = {
        "pre": random.uniform(0, 1, (L, N, B, T)),
        "post": random.uniform(0, 2, (L, N, B, T)),
        "res": np.eye(N)[:, :, None, None] + 0.3 * random.normal(size=(L, N, N, B, T)),
        "streams": random.normal(size=(L, B, T, N * C)) * np.repeat([1.0, 2.0, 5.0], C),
        "y": random.normal(size=(L, B, T, C)),
    }
    raw = {key: np.float32(value) for key, value in raw.items()}

    @jax.jit
    def sampled(given):
        dense = given["pre"], given["post"], given["res"]
        link = types.SimpleNamespace(dense=lambda c, y: dense, flat=lambda streams: streams)
        return sample_sublayer(link, given["streams"], None, given["y"], SAMPLED)

    rows = [sampled({key: value[l] for key, value in raw.items()}) for l in range(L)]
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: np.float64(value) for key, value in raw.items()}, stacked


def of_token(values, token):
    """Values [..., B, T] of one of the B T tokens."""
    return values[..., token // T, token % T]


def product(factors):
    """The last factor times ... times the first, by loops."""
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
    """Of the rows of |P|, over ln n."""
    total = 0.0
    for row in P:
        weight = sum(abs(entry) for entry in row)
        total -= sum(abs(entry) / weight * math.log(abs(entry) / weight) for entry in row)
    return total / N / math.log(N)


def test_gains_marginals_and_entropy(collected):
    raw, stacked = collected
    out = summarize(stacked)
    H = [[of_token(raw["res"][l], token) for l in range(L)] for token in SHOWN]
    mean_H = [sum(H[s][l] for s in range(SAMPLED)) / SAMPLED for l in range(L)]
    for l in range(L):
        single = [H[s][l] for s in range(SAMPLED)]
        up = [product(H[s][: l + 1]) for s in range(SAMPLED)]
        down = [product(H[s][l:]) for s in range(SAMPLED)]
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
        for key, i in itertools.product(("pre", "post"), range(N)):
            expected = np.mean([of_token(raw[key][l, i], token) for token in SHOWN])
            np.testing.assert_allclose(out[f"h_{key}"][l, i], expected, rtol=1e-6)
        streams = [raw["streams"][l].reshape(-1, N, C)[token] for token in SHOWN]
        for i in range(N):
            size = math.sqrt(np.mean([x**2 for one in streams for x in one[i]]))
            assert out["stream_rms"][l, i] == pytest.approx(size, rel=1e-6)
        assert out["branch_rms"][l] == pytest.approx(math.sqrt(np.mean([x**2 for x in raw["y"][l].flat])), rel=1e-6)
        pairs = [(x[i], x[j]) for x in streams for i in range(N) for j in range(i)]
        cosines = [sum(a * b) / math.sqrt(sum(a**2)) / math.sqrt(sum(b**2)) for a, b in pairs]
        assert out["stream_cosine"][l] == pytest.approx(np.mean(cosines), abs=1e-6)


def test_gains_beyond_float32_are_numbers():
    """Three matrices of 1e20: the gain of their product is 8e60."""
    shapes = {"pre": (3, 1, 2), "post": (3, 1, 2), "stream_rms": (3, 2), "branch_rms": (3,)}
    shapes |= dict.fromkeys(STREAM_MEASURES, (3,))
    given = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    out = summarize(given | {"res": np.full((3, 1, 2, 2), 1e20, np.float32)})
    one = 2 * float(np.float32(1e20))
    np.testing.assert_allclose(out["composite_forward"], [one, one**2, one**3], rtol=1e-12)
    np.testing.assert_allclose(out["composite_backward"], [one**3, one**2, one], rtol=1e-12)
