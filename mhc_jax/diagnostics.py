"""Gains, marginals, entropy and stream similarity: pure functions over returned coefficients (mHC section 3.1, Figures 3 and 7).

Conventions.  H_res is applied untransposed, x_out = H x_in, so the operator between sub-layers a and b is P = H_b ... H_a.

    forward gain  = max_i |sum_j P_ij|   (largest absolute row sum: what a signal shared by all streams grows by on the way up)
    backward gain = max_j |sum_i P_ij|   (largest absolute column sum: the same for gradients on the way down)

as in mHC Figures 3 and 7.  The operator norms max_i sum_j |P_ij| and max_j sum_i |P_ij| bound every signal; they are equal to the
gains for doubly stochastic matrices and larger for HC's signed ones, and are reported beside them (`*_norm`).  Gains are per
token, then averaged; the product of token-averaged matrices (the paper's heat maps) is reported too (`composite_mean_*`).

`sample_sublayer` is part of the compiled model; everything else is NumPy in float64 on the few values that come back (32
sub-layers, 64 tokens, n = 4: 128 KiB), which costs milliseconds where compiling it cost half a second a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from mhc_kernels import split

if TYPE_CHECKING:
    from mhc_jax.connections import Connection


def sample_sublayer(link: Connection, streams: Any, c: Any, y: Float[Array, "B T C"], count: int) -> dict[str, Array]:
    """Raw material of one sub-layer at `count` evenly spaced tokens of the batch.

    Returns float32: pre [S, n], post [S, n], res [S, n, n], stream_cosine [] (mean over pairs and tokens), stream_rms [n],
    branch_rms [].
    """
    pre, post, res = link.dense(c, y)
    tokens = y.shape[0] * y.shape[1]
    picked = jnp.linspace(0, tokens - 1, min(count, tokens)).astype(jnp.int32)

    def pick(a: Array, small: int) -> Array:
        flat = a.reshape(*a.shape[:small], tokens)[..., picked]
        return jnp.moveaxis(flat, -1, 0)

    sampled = [s.reshape(tokens, -1)[picked].astype(jnp.float32) for s in split(link.flat(streams), pre.shape[0])]
    return {
        "pre": pick(pre, 1),
        "post": pick(post, 1),
        "res": pick(res, 2),
        "stream_cosine": stream_cosine(jnp.stack(sampled, 1)),
        "stream_rms": jnp.stack([rms(s) for s in sampled]),
        "branch_rms": rms(y.astype(jnp.float32)),
    }


def rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Root of the mean square of all numbers, finite where they are: they are scaled by the largest before they are squared."""
    # Within this range the scale has an inverse in float32, and no square of a scaled number overflows.
    scale = jnp.clip(jnp.abs(x).max(), 1e-30, 1e30)
    return scale * jnp.sqrt(jnp.mean((x / scale) ** 2))


def stream_cosine(x: Float[Array, "S n C"]) -> Float[Array, ""]:
    """Cosine similarity, mean over pairs of different streams and over tokens; 1 for n = 1."""
    n = x.shape[1]
    if n == 1:
        return jnp.ones(())
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
    cosines = jnp.einsum("sic,sjc->sij", unit, unit, precision="highest")
    return (jnp.sum(cosines, (1, 2)) - n).mean() / (n * (n - 1))


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
    """|lambda_2| / |lambda_1|, what a matrix leaves of differences between streams, relative to what they share.

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
    [L, n, n], h_pre, h_post [L, n] (token means), stream_cosine, stream_rms [L, n], branch_rms.
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
            "stream_cosine": values["stream_cosine"],
            "stream_rms": values["stream_rms"],
            "branch_rms": values["branch_rms"],
        }
