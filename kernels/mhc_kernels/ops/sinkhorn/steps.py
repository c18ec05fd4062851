r"""The steps of Sinkhorn-Knopp as updates of two scaling vectors, and their gradient, for plain XLA and the Pallas kernels.

Every iterate of mHC (arXiv 2512.24880) Eq. 9 has the form $M = \mathrm{diag}(r)\, K\, \mathrm{diag}(c)$ with one fixed K.  So the
state of the iteration is r and c: 2n numbers a token instead of $n^2$.  One pair of steps, columns first and rows last, is

    $c' = c / (c\, (K^\top r) + \epsilon)$,  $r' = r / (r\, (K c') + \epsilon)$

elementwise.  With $\epsilon = 0$ the pair is $c' = 1 / K^\top r$ and $r' = 1 / K c'$.  `Steps.first_step` makes K and the first r.

The gradient is that of the steps that were taken, not of their limit.  Write $u = K c'$ and $v = K^\top r$.  Then

    $\partial r' / \partial u = -r'^2$,  $\partial r' / \partial r = \epsilon\, (r' / r)^2$,

and likewise with c', v and c for r', u and r.

A bar stands for the gradient of a quantity.  The backward pass undoes a pair from its end to its start (`Steps.undo_pair`):

    $\bar u = -\bar r' r'^2$,  $\bar c' \leftarrow \bar c' + K^\top \bar u$,  $\bar v = -\bar c' c'^2$
    $\bar K \leftarrow \bar K + \bar u c'^\top + r \bar v^\top$
    $\bar r = K \bar v + \epsilon\, \bar r' (r' / r)^2$,  $\bar c = \epsilon\, \bar c' (c' / c)^2$

The backward pass starts from the last $M = \mathrm{diag}(r)\, K\, \mathrm{diag}(c)$, whose gradient G gives

    $\bar r = (G \circ K)\, c$,  $\bar c = (G \circ K)^\top r$,  $\bar K = G \circ r c^\top$.

At the end, `Steps.logits_gradient` turns the gradients of K and of the first r into the gradient of the logits.  It is
$\bar K \circ K$ if $\epsilon = 0$.  Otherwise it is $S - Q \circ 1 (1^\top S)$, where Q is the softmax of each column of the
logits, $K = Q + \epsilon$, and $S = (\bar K - (\bar r \circ r^2) 1^\top) \circ Q$.

The gradient is linear in G, but the scalings of hard problems reach 1e8, and the gradients on the way are products of several.
They would leave the range of float32 where G is far from 1.  So each token's G is first multiplied by a power of two (`scale`),
and the gradient of its logits is divided by that power.  This changes no digit, unless an entry of G is so small beside the
largest one (below about 1e-38 of it) that it becomes denormal.

Only the logits are kept from the forward pass, so the backward pass computes r and c of every step again.  The loop over all
pairs is `_sinkhorn_bwd` in `xla.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from mhc_kernels.xla import add, once

Scalings = tuple[Array, Array]
"""The scaling vectors r of the rows and c of the columns, or their gradients, [n, ...] each."""


def pairs_left(num_iters: int, eps: float) -> int:
    """Return the number of pairs of steps that follow `Steps.first_step`, which takes the first pair itself if eps > 0."""
    return num_iters if eps == 0 else num_iters - 1


def scale(most: Array) -> tuple[Array, Array]:
    """Return, for each token, the factor of G and its inverse.

    The factor is the power of two that brings the largest absolute entry of G, `most` (float32), to between 1 and 2, but no
    larger than 2^100 and no smaller than 2^-100.  Within this range, gradients for G and 2^k G have the same digits, unless an
    entry of G or of a gradient is denormal.
    """
    exponent = jnp.clip(lax.bitcast_convert_type(most, jnp.int32) >> 23, 27, 227)
    up, down = (lax.bitcast_convert_type(k << 23, jnp.float32) for k in (254 - exponent, exponent))
    return up, down


def largest(G: Array) -> Array:
    """Return the largest absolute entry of each matrix of G [n, n, ...]."""
    return functools.reduce(jnp.maximum, functools.reduce(jnp.maximum, jnp.abs(G)))


def column_softmax(logits: Array) -> Array:
    """Return the softmax of each column j of logits [i, j, ...], over its rows i."""
    e = jnp.exp(logits - functools.reduce(jnp.maximum, logits)[None])
    return e / add(e)[None]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of Sinkhorn-Knopp on matrices [n, n, ...], whose later axes are tokens, for one epsilon."""

    eps: float
    summed: bool
    """Whether the product of K and a vector is computed as a sum over an axis; if not, it is computed as n multiply-adds."""
    keep: Callable[[Array], Array] = lambda a: a
    """Function that is applied to a value that is used several times, such as `mhc_kernels.xla.once`; the default does nothing."""

    def columns(self, K: Array, r: Array) -> Array:
        """Return K^T r, [n, ...]: the column sums of K with its rows scaled by r."""
        return jnp.sum(K * r[:, None], axis=0) if self.summed else add(K[i] * r[i][None] for i in range(len(K)))

    def rows(self, K: Array, c: Array) -> Array:
        """Return K c, [n, ...]: the row sums of K with its columns scaled by c."""
        return jnp.sum(K * c[None], axis=1) if self.summed else add(K[:, j] * c[j][None] for j in range(len(K)))

    def first_step(self, logits: Array) -> tuple[Array, Array]:
        """Return the fixed matrix K and the first row scaling r for logits [n, n, ...].

        eps = 0: K = exp(logits - a_j - b_i) and r = exp(b).  Here a_j is the largest logit of column j, and b_i is the largest
        entry of row i of logits - a_j.  Each row and column of K then holds a 1 and nothing larger, so no sum over- or underflows.
        The first iterate does not depend on a or b, so neither needs a gradient.

        eps > 0: K = Q + eps with the column softmax Q, and r = 1 / (K 1 + eps).  This is already the first pair of steps.
        """
        if self.eps == 0:
            centred = logits - once(functools.reduce(jnp.maximum, logits))[None]
            b = once(functools.reduce(jnp.maximum, jnp.swapaxes(centred, 0, 1)))
            return jnp.exp(centred - b[:, None]), jnp.exp(b)
        K = column_softmax(logits) + self.eps
        return K, 1 / (self.rows(K, jnp.ones_like(K[0])) + self.eps)

    def _rescale(self, s: Array, product: Array) -> Array:
        return 1 / product if self.eps == 0 else s / (s * product + self.eps)

    def pair(self, K: Array, scalings: Scalings) -> Scalings:
        """Take one pair of steps, over the columns and then over the rows, and return the new scaling vectors r and c."""
        r, c = scalings
        c = self._rescale(c, self.columns(K, r))
        return self._rescale(r, self.rows(K, c)), c

    def scalings(self, K: Array, r: Array, pairs: Any) -> Scalings:
        """Return the scaling vectors r and c after `pairs` pairs of steps, which run in a loop from the first row scaling `r`."""
        return lax.fori_loop(0, pairs, lambda _, scalings: self.pair(K, scalings), (r, jnp.ones_like(r)))

    def undo_pair(self, K: Array, bars: Scalings, after: Scalings, before: Scalings) -> tuple[Scalings, Array]:
        """Return the gradients of the scaling vectors before a pair of steps, and what the pair adds to the gradient of K.

        `before` and `after` are the scaling vectors before and after the pair, and `bars` are the gradients of those after it.
        """
        (r_bar, c_bar), (r, c), (r_before, c_before) = bars, after, before
        u_bar = self.keep(-r_bar * r * r)
        c_bar = c_bar + self.columns(K, u_bar)
        v_bar = self.keep(-c_bar * c * c)
        K_bar = u_bar[:, None] * c[None] + r_before[:, None] * v_bar[None]
        through_r, through_c = self._through_eps(r_bar, r / r_before), self._through_eps(c_bar, c / c_before)
        return (self.rows(K, v_bar) + through_r, through_c), K_bar

    def _through_eps(self, s_bar: Array, ratio: Array) -> Array:
        return jnp.zeros_like(s_bar) if self.eps == 0 else self.eps * s_bar * (ratio * ratio)

    def logits_gradient(self, K: Array, Q: Array, r: Array, K_bar: Array, r_bar: Array) -> Array:
        """Return the gradient of the logits from K and r of `first_step` and their gradients K_bar and r_bar.

        `Q` is the softmax over each column of the logits, which is used only if eps > 0.
        """
        if self.eps == 0:
            return self.keep(K_bar * K)
        S = (K_bar - (r_bar * r * r)[:, None]) * Q
        return S - self.columns(S, jnp.ones_like(r))[None] * Q
