"""Gains, marginals, entropy and stream similarity: pure functions over returned coefficients (mHC section 3.1, Figures 3 and 7).

Conventions.  H_res is applied untransposed, x_out = H x_in, so the operator between sub-layers a and b is P = H_b ... H_a.

    forward gain  = max_i |sum_j P_ij|   (largest absolute row sum: what a signal shared by all streams grows by on the way up)
    backward gain = max_j |sum_i P_ij|   (largest absolute column sum: the same for gradients on the way down)

as in mHC Figures 3 and 7.  The operator norms max_i sum_j |P_ij| and max_j sum_i |P_ij| bound every signal; they are equal to the
gains for doubly stochastic matrices and larger for HC's signed ones, and are reported beside them (`*_norm`).  Gains are per
token, then averaged; the product of token-averaged matrices (the paper's heat maps) is reported too (`composite_mean_*`).

Collapse.  The streams of a token are x_1 ... x_n, and G = X X^T is their n x n Gram matrix.  Three numbers describe it, each a
mean over tokens (`stream_measures`):

    stream_cosine      mean of cos(x_i, x_j) over the pairs i < j: 1 for streams of one direction; signs cancel in it
    stream_cosine_abs  mean of |cos(x_i, x_j)| over the same pairs: 1 exactly when all streams are multiples of one vector
    stream_rank        (tr G)^2 / tr(G^2), the participation ratio of G's eigenvalues: 1 for multiples of one vector, or where
                       one stream outweighs all others; n for orthogonal streams of equal norm

A stream of zeros has no direction, so its pairs are left out.  Where fewer than two streams are not zero, all three are 1.  A 1
does not say that streams are equal in size; `stream_rms` tells their sizes.  For every token the largest eigenvalue's share of
tr G lies between 1 / stream_rank and 1 / sqrt(stream_rank): a rank near 1 needs no second number.

`sample_sublayer` is part of the compiled model; everything else is NumPy in float64 on the few values that come back (32
sub-layers, 64 tokens, n = 4: 128 KiB), which costs milliseconds where compiling it cost half a second a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from mhc_kernels import split

if TYPE_CHECKING:
    from mhc_jax.connections import Connection

DIAGNOSTICS_TOKENS = 64
"""Evenly spaced tokens of one held-out sequence at which gains are measured."""
STREAM_MEASURES = ("stream_cosine", "stream_cosine_abs", "stream_rank")
"""Numbers that see whether streams have become one; summary.json has their means over sub-layers as `final_*`."""


def sample_sublayer(link: Connection, streams: Any, c: Any, y: Float[Array, "B T C"], count: int) -> dict[str, Array]:
    """Raw material of one sub-layer at `count` evenly spaced tokens of the batch.

    Returns float32: pre [S, n], post [S, n], res [S, n, n], `stream_measures` of the streams that the sub-layer reads, stream_rms
    [n], branch_rms [].
    """
    pre, post, res = link.dense(c, y)
    tokens = y.shape[0] * y.shape[1]
    picked = jnp.linspace(0, tokens - 1, min(count, tokens)).astype(jnp.int32)

    def pick(a: Array, small: int) -> Array:
        flat = a.reshape(*a.shape[:small], tokens)[..., picked]
        return jnp.moveaxis(flat, -1, 0)

    sampled = jnp.stack([s.reshape(tokens, -1)[picked] for s in split(link.flat(streams), pre.shape[0])], 1)
    return {
        "pre": pick(pre, 1),
        "post": pick(post, 1),
        "res": pick(res, 2),
        **stream_measures(sampled),
        "stream_rms": root_mean_square(sampled, (0, 2)),
        "branch_rms": root_mean_square(y, (0, 1, 2)),
    }


def root_mean_square(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """sqrt(mean(x^2)) over `axes` in float32, for entries of any finite size."""
    scaled, exponent = _scaled(x, axes)
    return jnp.ldexp(jnp.sqrt(jnp.mean(scaled**2, axes)), jnp.squeeze(exponent, axes))


def stream_measures(x: Float[Array, "S n C"]) -> dict[str, Float[Array, ""]]:
    """`STREAM_MEASURES` of the streams of S tokens, float32, for streams of any finite size; infinite or NaN streams give NaN.

    The definitions are at the top of this file.
    """
    n = x.shape[1]
    scaled, exponent = _scaled(x, (2,))
    norm = jnp.sqrt(jnp.sum(scaled**2, 2))
    unit = scaled / jnp.where(norm == 0, 1, norm)[:, :, None]
    cosine = jnp.einsum("sic,sjc->sij", unit, unit, precision="highest")
    zero = norm == 0
    pairs = ~(zero[:, :, None] | zero[:, None, :] | jnp.eye(n, dtype=bool)[None])
    count = jnp.sum(pairs)

    def over_pairs(values: Float[Array, "S n n"]) -> Float[Array, ""]:
        return jnp.where(count == 0, 1, jnp.sum(jnp.where(pairs, values, 0)) / jnp.maximum(count, 1))

    # Norms relative to the token's largest power of two, so that their fourth powers stay within float32.
    size = jnp.ldexp(norm, (exponent - jnp.max(jnp.where(zero[:, :, None], -999, exponent), 1, keepdims=True))[:, :, 0])
    gram = cosine * size[:, :, None] * size[:, None, :]
    trace, squares = jnp.sum(size**2, 1), jnp.sum(gram**2, (1, 2))
    return {
        "stream_cosine": over_pairs(cosine),
        "stream_cosine_abs": over_pairs(jnp.abs(cosine)),
        "stream_rank": jnp.mean(jnp.where(trace == 0, 1, trace**2 / jnp.where(trace == 0, 1, squares))),
    }


def rank_one(x: Float[Array, "*tokens nC"], num_streams: int) -> Float[Array, "*tokens nC"]:
    """The best rank-one approximation v v^T X of each token's streams X [n, C], v the leading eigenvector of X X^T.

    Streams that are one vector up to sign and scale come back as they are; computed in float32, in the dtype of x.
    """
    X, exponent = _scaled(x.reshape(*x.shape[:-1], num_streams, -1), (-2, -1))
    _, vectors = jnp.linalg.eigh(jnp.einsum("...ic,...jc->...ij", X, X, precision="highest"))
    v = vectors[..., -1]
    u = jnp.einsum("...i,...ic->...c", v, X, precision="highest")
    return jnp.ldexp(v[..., :, None] * u[..., None, :], exponent).reshape(x.shape).astype(x.dtype)


def _scaled(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """(y, e), with x = y 2^e and max |y| over `axes` below 1, so that no square of y overflows.

    A power of two, since XLA divides by multiplying with the reciprocal, and flushes that of more than 8.5e37 to 0.
    """
    x = x.astype(jnp.float32)
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axes, keepdims=True))[1]
    return jnp.ldexp(x, -exponent), exponent


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Is every number of every array finite?"""
    return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()


Matrices = Float[np.ndarray, "*batch n n"]
PerMatrix = Float[np.ndarray, "*batch"]


def forward_gain(P: Matrices) -> PerMatrix:
    """max_i |sum_j P_ij|."""
    return np.abs(P.sum(-1)).max(-1)


def backward_gain(P: Matrices) -> PerMatrix:
    """max_j |sum_i P_ij|."""
    return np.abs(P.sum(-2)).max(-1)


def forward_norm(P: Matrices) -> PerMatrix:
    """max_i sum_j |P_ij|, the infinity norm."""
    return forward_gain(np.abs(P))


def backward_norm(P: Matrices) -> PerMatrix:
    """max_j sum_i |P_ij|, the 1-norm."""
    return backward_gain(np.abs(P))


def composites(H: Float[np.ndarray, "L *batch n n"]) -> tuple[np.ndarray, np.ndarray]:
    """(products H_l ... H_1 for every l, products H_L ... H_l for every l): the two profiles of mHC Figure 3."""
    up, down = np.array(H), np.array(H)
    for k in range(1, len(H)):
        up[k] = H[k] @ up[k - 1]
        down[-1 - k] = down[-k] @ H[-1 - k]
    return up, down


def row_entropy(P: Matrices) -> PerMatrix:
    """Mean entropy of the rows of |P|, normalised to sum 1, over ln n: 0 for a permutation or n = 1, 1 if uniform."""
    n = P.shape[-1]
    if n == 1:
        return np.zeros(P.shape[:-2])
    p = np.abs(P) / np.maximum(np.abs(P).sum(-1, keepdims=True), 1e-30)
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean(-1) / np.log(n)


def second_eigenvalue(P: Matrices) -> PerMatrix:
    """|lambda_2| / |lambda_1|: by how much each further application shrinks what differs from the leading eigenvector.

    0 for n = 1, 1 for the identity, 0 for 1/n; for doubly stochastic matrices |lambda_1| = 1.
    """
    if P.shape[-1] == 1:
        return np.zeros(P.shape[:-2])
    moduli = np.sort(np.abs(np.linalg.eigvals(P)), axis=-1)
    return moduli[..., -2] / np.maximum(moduli[..., -1], 1e-30)


def summarize(collected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The record of one diagnostics step from what `Decoder` collected (L sub-layers, S tokens; arrays of any kind).

    Returns float64 arrays over depth, [L] unless said: single_forward, single_backward, composite_forward, composite_backward
    (means over tokens), composite_forward_max, composite_backward_max (over tokens), composite_forward_norm,
    composite_backward_norm (operator norms, means over tokens), composite_mean_forward, composite_mean_backward (product of
    token means), row_error, column_error (max |sum - 1|), entropy, uniform_distance (Frobenius, composite up to l), h_res
    [L, n, n], h_pre, h_post [L, n] (token means), stream_cosine, stream_cosine_abs, stream_rank, stream_rms [L, n], branch_rms.
    """
    values = {key: np.asarray(value, np.float64) for key, value in jax.device_get(collected).items()}
    H = values["res"]
    n = H.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):  # gains of a run that blows up are inf, and said to be
        up, down = composites(H)
        mean = H.mean(1)
        mean_up, mean_down = composites(mean)
        return {
            "single_forward": forward_gain(H).mean(1),
            "single_backward": backward_gain(H).mean(1),
            "composite_forward": forward_gain(up).mean(1),
            "composite_backward": backward_gain(down).mean(1),
            "composite_forward_max": forward_gain(up).max(1),
            "composite_backward_max": backward_gain(down).max(1),
            "composite_forward_norm": forward_norm(up).mean(1),
            "composite_backward_norm": backward_norm(down).mean(1),
            "composite_mean_forward": forward_gain(mean_up),
            "composite_mean_backward": backward_gain(mean_down),
            "row_error": np.abs(H.sum(-1) - 1).max((1, 2)),
            "column_error": np.abs(H.sum(-2) - 1).max((1, 2)),
            "entropy": row_entropy(H).mean(1),
            "uniform_distance": np.linalg.norm(up - 1 / n, axis=(-2, -1)).mean(1),
            "h_res": mean,
            "h_pre": values["pre"].mean(1),
            "h_post": values["post"].mean(1),
            **{key: values[key] for key in STREAM_MEASURES},
            "stream_rms": values["stream_rms"],
            "branch_rms": values["branch_rms"],
        }
