r"""Gains, marginals, entropy and similarity of streams: pure functions of coefficients and streams (mHC section 3.1, Fig. 3, 7).

**Gains.**  H_res is applied without a transpose, so sub-layers a to b multiply the streams with the composite $P = H_b \cdots H_a$.

    forward gain $= \max_i |\sum_j P_{ij}|$, the largest absolute row sum: growth of a signal of all streams on its way up
    backward gain $= \max_j |\sum_i P_{ij}|$, the largest absolute column sum: growth of gradients on their way down

The operator norms $\max_i \sum_j |P_{ij}|$ and $\max_j \sum_i |P_{ij}|$ bound the growth of every signal and are reported as
`*_norm`.  For doubly stochastic matrices they equal the gains.  For HC's matrices, with entries of both signs, they can be larger.
Gains are computed for each token and then averaged.  `composite_mean_*`, which the paper's heat maps show, are gains of products of
matrices that are first averaged over tokens.

**Collapse** means that the streams become alike.  The streams of a token are $x_1 \dots x_n$, the rows of X, and $G = X X^\top$ is
their n x n Gram matrix.  Three numbers, each a mean over tokens, measure collapse (`stream_measures`):

    stream_cosine      mean of cos(x_i, x_j) over the pairs i < j: 1 for streams of one direction, lower for opposite signs
    stream_cosine_abs  mean of |cos(x_i, x_j)| over the same pairs: 1 exactly when all streams are multiples of one vector
    stream_rank        (tr G)^2 / tr(G^2), the participation ratio of G's eigenvalues: 1 if all streams are multiples of one
                       vector or one stream is far larger than all others, n if they are orthogonal and of equal norm

A stream of zeros has no direction, so the cosines leave it out.  If fewer than two streams are not zero, all three numbers are 1.
A value of 1 does not mean that streams are equal in size; `stream_rms` has their sizes.  The largest eigenvalue's share of tr G
lies between 1 / stream_rank and 1 / sqrt(stream_rank) for every token, so that stream_rank alone tells whether it is near 1.

**Saturation** means that H_res hardly changes with its logits any more.  `saturation` is the share of the entries of H_res that
exceed 0.99.  It is 1/n for the identity and for every other permutation, which are the extremes of a doubly stochastic H_res.
`res_logit_min` and `res_logit_max` are the smallest and the largest logit of H_res, before Sinkhorn or what stands in its place.

`sample_sublayer`, with the JAX functions it calls, is part of the compiled model.  Gains and all functions after them are NumPy in
float64, which takes milliseconds for the few sampled values and needs no compilation.
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
"""Number of tokens at which diagnostics are taken, evenly spaced in one held-out sequence."""
SATURATED = 0.99
"""An entry of H_res above this value counts as saturated."""
STREAM_MEASURES = ("stream_cosine", "stream_cosine_abs", "stream_rank")
"""Names of the numbers that show whether the streams have become alike.  summary.json has, as `final_*`, their means over
sub-layers at the last diagnostics step."""


def sample_sublayer(link: Connection, streams: Any, c: Any, y: Float[Array, "B T C"], count: int) -> dict[str, Array]:
    """Return the arrays that diagnostics need of one sub-layer, at S evenly spaced tokens of the batch.

    Args:
      link: connection of the sub-layer.
      streams: streams that the sub-layer reads.
      c: coefficients of the sub-layer.
      y: output of the branch of the sub-layer.
      count: number S of tokens to collect.  If the batch has fewer tokens, S is their number.

    Returns:
      float32 arrays: pre [S, n], post [S, n] and res [S, n, n], the `stream_measures` [] and stream_rms [n] of the S tokens'
      streams, and branch_rms [] of y at all tokens.  Kinds that make H_res from logits add res_logit_min [] and res_logit_max [],
      the smallest and the largest of these logits at the S tokens.  Kinds that read sources of earlier depth add source_weights
      [S, slots].
    """
    pre, post, res = link.dense(c, y)
    tokens = y.shape[0] * y.shape[1]
    picked = jnp.linspace(0, tokens - 1, min(count, tokens)).astype(jnp.int32)

    def pick(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(*a.shape[:-2], tokens)[..., picked], -1, 0)

    sampled = jnp.stack([s.reshape(tokens, -1)[picked] for s in split(link.flat(streams), pre.shape[0])], 1)
    logits = link.mixing_logits(streams)
    of_logits = {} if logits is None else {"res_logit_min": pick(logits).min(), "res_logit_max": pick(logits).max()}
    weights = link.source_weights(c)
    of_sources = {} if weights is None else {"source_weights": pick(weights)}
    return {
        "pre": pick(pre),
        "post": pick(post),
        "res": pick(res),
        **stream_measures(sampled),
        "stream_rms": root_mean_square(sampled, (0, 2)),
        "branch_rms": root_mean_square(y, (0, 1, 2)),
        **of_logits,
        **of_sources,
    }


def root_mean_square(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    r"""Return the root mean square $\sqrt{\mathrm{mean}(x^2)}$ over `axes`, float32.  No square overflows for finite x.

    Examples:
      >>> print(root_mean_square(jnp.array([3.0, -3.0, 3.0, 3.0]), (0,)))
      3.0
    """
    scaled, exponent = _scaled(x, axes)
    return jnp.ldexp(jnp.sqrt(jnp.mean(scaled**2, axes)), jnp.squeeze(exponent, axes))


def stream_measures(x: Float[Array, "S n C"]) -> dict[str, Float[Array, ""]]:
    """Return the numbers named in `STREAM_MEASURES`, defined at the top of this file, for the streams of S tokens, float32.

    Finite streams of any size do not overflow.  Infinite or NaN streams give NaN.

    Examples:
      A stream and its negative are one vector up to sign.

      >>> measures = stream_measures(jnp.array([[[1.0, 0.0], [-1.0, 0.0]]]))
      >>> {name: float(value) for name, value in measures.items()}
      {'stream_cosine': -1.0, 'stream_cosine_abs': 1.0, 'stream_rank': 1.0}
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

    # The norm of a stream is `norm` times 2^`exponent`.  All norms of one token are divided by the token's largest 2^`exponent`, so
    # that the fourth powers of the norms, which `gram**2` needs, fit float32.
    size = jnp.ldexp(norm, (exponent - jnp.max(jnp.where(zero[:, :, None], -999, exponent), 1, keepdims=True))[:, :, 0])
    gram = cosine * size[:, :, None] * size[:, None, :]
    trace, squares = jnp.sum(size**2, 1), jnp.sum(gram**2, (1, 2))
    return {
        "stream_cosine": over_pairs(cosine),
        "stream_cosine_abs": over_pairs(jnp.abs(cosine)),
        "stream_rank": jnp.mean(jnp.where(trace == 0, 1, trace**2 / jnp.where(trace == 0, 1, squares))),
    }


def rank_one(x: Float[Array, "*tokens nC"], num_streams: int) -> Float[Array, "*tokens nC"]:
    r"""Return the best rank-one approximation $v v^\top X$ of each token's streams X [n, C].

    v is the leading eigenvector of $X X^\top$.  Streams that are multiples of one vector come back unchanged.  The computation is
    in float32, and the result has the dtype of x.
    """
    X, exponent = _scaled(x.reshape(*x.shape[:-1], num_streams, -1), (-2, -1))
    _, vectors = jnp.linalg.eigh(jnp.einsum("...ic,...jc->...ij", X, X, precision="highest"))
    v = vectors[..., -1]
    u = jnp.einsum("...i,...ic->...c", v, X, precision="highest")
    return jnp.ldexp(v[..., :, None] * u[..., None, :], exponent).reshape(x.shape).astype(x.dtype)


def _scaled(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """Return (y, e) such that x = y 2^e and max |y| over `axes` is below 1, so that no square of y overflows.

    The scale is a power of two and not the maximum itself.  XLA would divide by the maximum by multiplying with its reciprocal, and
    it flushes the reciprocal of a number above 8.5e37 to 0.
    """
    x = x.astype(jnp.float32)
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axes, keepdims=True))[1]
    return jnp.ldexp(x, -exponent), exponent


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether all numbers in all arrays of a tree are finite, as a boolean array []."""
    return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()


Matrices = Float[np.ndarray, "*batch n n"]
PerMatrix = Float[np.ndarray, "*batch"]


def forward_gain(P: Matrices) -> PerMatrix:
    r"""Return the forward gain $\max_i |\sum_j P_{ij}|$ of each matrix (mHC section 3.1).

    Examples:
      >>> print(forward_gain(np.array([[[1.0, -0.5], [0.5, 1.0]]])))
      [1.5]
    """
    return np.abs(P.sum(-1)).max(-1)


def backward_gain(P: Matrices) -> PerMatrix:
    r"""Return the backward gain $\max_j |\sum_i P_{ij}|$ of each matrix (mHC section 3.1).

    Examples:
      >>> print(backward_gain(np.array([[[1.0, 1.0], [0.5, 1.0]]])))
      [2.]
    """
    return np.abs(P.sum(-2)).max(-1)


def composites(H: Float[np.ndarray, "L *batch n n"]) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the composites $H_l \cdots H_1$ and $H_L \cdots H_l$ for every l: the two profiles of mHC Figure 3.

    Forward gains of $H_l \cdots H_1$ tell how much a signal grows on its way up to sub-layer l.  Backward gains of
    $H_L \cdots H_l$ tell how much a gradient grows on its way down to sub-layer l.

    Examples:
      >>> up, down = composites(np.array([[[2.0]], [[3.0]], [[5.0]]]))
      >>> print(up.ravel(), down.ravel())
      [ 2.  6. 30.] [30. 15.  5.]
    """
    up, down = np.array(H), np.array(H)
    for k in range(1, len(H)):
        up[k] = H[k] @ up[k - 1]
        down[-1 - k] = down[-k] @ H[-1 - k]
    return up, down


def row_entropy(P: Matrices) -> PerMatrix:
    """Return the mean entropy of the rows of |P|, divided by ln n.  Rows are first normalised to the sum 1.

    The result is 1 for a matrix with equal entries, and 0 for a permutation matrix or n = 1.
    """
    n = P.shape[-1]
    if n == 1:
        return np.zeros(P.shape[:-2])
    p = np.abs(P) / np.maximum(np.abs(P).sum(-1, keepdims=True), 1e-30)
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean(-1) / np.log(n)


def second_eigenvalue(P: Matrices) -> PerMatrix:
    r"""Return the ratio $|\lambda_2| / |\lambda_1|$ of the two largest eigenvalues of each matrix.

    With each application of P, the deviation from the leading eigenvector shrinks by this factor.  The ratio is 1 for the identity,
    and 0 for n = 1 or for the matrix with all entries 1/n.  For doubly stochastic matrices $|\lambda_1| = 1$.
    """
    if P.shape[-1] == 1:
        return np.zeros(P.shape[:-2])
    moduli = np.sort(np.abs(np.linalg.eigvals(P)), axis=-1)
    return moduli[..., -2] / np.maximum(moduli[..., -1], 1e-30)


def summarize(collected: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the results of one diagnostics step, from the arrays that `Decoder` returned for L sub-layers and S tokens.

    Returns:
      float64 arrays over sub-layers, [L] unless another shape is given:

      - single_forward, single_backward: gains of H_res, means over tokens.
      - composite_forward, composite_backward: gains of the `composites`, means over tokens.  `*_max` are the largest gains over
        tokens, and `*_norm` are means of the operator norms of the composites.
      - composite_mean_forward, composite_mean_backward: gains of the composites of matrices H_res averaged over tokens.
      - row_error, column_error: largest |sum - 1| of a row or column of H_res, over all tokens.
      - entropy: `row_entropy` of H_res, mean over tokens.
      - uniform_distance: Frobenius distance of the composite of sub-layers 1 to l from the matrix with all entries 1/n, mean over
        tokens.
      - h_res [L, n, n], h_pre [L, n], h_post [L, n]: coefficients, means over tokens.
      - saturation: share of the entries of H_res above `SATURATED`, over all tokens.
      - stream_cosine, stream_cosine_abs, stream_rank, stream_rms [L, n], branch_rms and, of kinds that make H_res from logits,
        res_logit_min and res_logit_max: as `sample_sublayer` returns them.
      - depth_mixing [L, slots], of kinds that read sources of earlier depth: the weights with which sub-layers read the slots,
        means over tokens (and heads).  A slot that a sub-layer does not see has the weight 0.
    """
    values = {key: np.asarray(value, np.float64) for key, value in jax.device_get(collected).items()}
    H = values["res"]
    n = H.shape[-1]
    with np.errstate(over="ignore", invalid="ignore"):  # gains of a run that diverges are inf
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
            "composite_forward_norm": forward_gain(np.abs(up)).mean(1),
            "composite_backward_norm": backward_gain(np.abs(down)).mean(1),
            "composite_mean_forward": forward_gain(mean_up),
            "composite_mean_backward": backward_gain(mean_down),
            "row_error": np.abs(H.sum(-1) - 1).max((1, 2)),
            "column_error": np.abs(H.sum(-2) - 1).max((1, 2)),
            "entropy": row_entropy(H).mean(1),
            "uniform_distance": np.linalg.norm(up - 1 / n, axis=(-2, -1)).mean(1),
            "h_res": mean,
            "h_pre": values["pre"].mean(1),
            "h_post": values["post"].mean(1),
            "saturation": (H > SATURATED).mean((1, 2, 3)),
            **{key: values[key] for key in (*STREAM_MEASURES, "stream_rms", "branch_rms")},
            **{key: values[key] for key in ("res_logit_min", "res_logit_max") if key in values},
            **({"depth_mixing": values["source_weights"].mean(1)} if "source_weights" in values else {}),
        }
