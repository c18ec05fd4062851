r"""The steps of Sinkhorn-Knopp in scaling-vector form, and their gradient, for plain XLA and the Pallas kernels.

Every iterate of mHC (arXiv 2512.24880) Eq. 9 has the form $M = \mathrm{diag}(r)\, K\, \mathrm{diag}(c)$ with one fixed K.  So the
state of the iteration is 2n numbers a token instead of $n^2$.  One pair of steps, columns first and rows last, is

    $c' = c / (c\, (K^\top r) + \epsilon)$,  $r' = r / (r\, (K c') + \epsilon)$

elementwise.  With $\epsilon = 0$ the pair is $c' = 1 / K^\top r$ and $r' = 1 / K c'$.  The first step differs, see `first_step`.

The gradient is that of the truncated iteration.  Write $u = K c'$ and $v = K^\top r$.  Then

    $\partial r' / \partial u = -r'^2$,  $\partial r' / \partial r = \epsilon\, (r' / r)^2$,

and likewise with c', v and c for r', u and r.

With a bar for the gradient of a quantity, a pair is undone from its end to its start (`Steps.undo_pair`):

    $\bar u = -\bar r' r'^2$,  $\bar c' \leftarrow \bar c' + K^\top \bar u$,  $\bar v = -\bar c' c'^2$
    $\bar K \leftarrow \bar K + \bar u c'^\top + r \bar v^\top$
    $\bar r = K \bar v + \epsilon\, \bar r' (r' / r)^2$,  $\bar c = \epsilon\, \bar c' (c' / c)^2$

The walk back starts from the last $M = \mathrm{diag}(r)\, K\, \mathrm{diag}(c)$.  `Steps.logits_gradient` then turns the gradients
of K and of the first r into the gradient of the logits.  Only the logits are kept from the forward pass: the backward pass computes
the scalings again.
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
"""The scalings r of rows and c of columns, or their gradients, [n, ...] each."""


def pairs_left(num_iters: int, eps: float) -> int:
    """Return the number of pairs of steps that follow `first_step`, which does the first pair itself if eps > 0."""
    return num_iters if eps == 0 else num_iters - 1


def column_softmax(logits: Array) -> Array:
    """Return the softmax of each column j of logits [i, j, ...], over its rows i."""
    e = jnp.exp(logits - functools.reduce(jnp.maximum, logits)[None])
    return e / add(e)[None]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps on matrices [n, n, ...], whose later axes are tokens, for one epsilon and one way to sum."""

    eps: float
    summed: bool
    """Whether a product with K is a sum over an axis; if not, it is n multiply-adds."""
    keep: Callable[[Array], Array] = lambda a: a
    """Function applied to values that are used several times, such as `once`; the default does nothing."""

    def columns(self, K: Array, r: Array) -> Array:
        """Return K^T r, [n, ...]: the column sums of K with its rows scaled by r."""
        return jnp.sum(K * r[:, None], axis=0) if self.summed else add(K[i] * r[i][None] for i in range(len(K)))

    def rows(self, K: Array, c: Array) -> Array:
        """Return K c, [n, ...]: the row sums of K with its columns scaled by c."""
        return jnp.sum(K * c[None], axis=1) if self.summed else add(K[:, j] * c[j][None] for j in range(len(K)))

    def first_step(self, logits: Array) -> tuple[Array, Array]:
        """Return K and the first r.

        eps = 0: K = exp(logits - a_j - b_i) and r = exp(b).  Here a_j is the largest logit of column j, and b_i is the largest
        entry of row i of logits - a_j.  Each row and column of K then holds a 1 and nothing larger, so no sum over- or underflows.
        The first iterate does not depend on a or b, so neither needs a gradient.

        eps > 0: K = Q + eps with the column softmax Q, and r = 1 / (K 1 + eps): the first pair of steps is done.
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
        """Take one pair of steps, over the columns and then over the rows, and return the new scalings r and c."""
        r, c = scalings
        c = self._rescale(c, self.columns(K, r))
        return self._rescale(r, self.rows(K, c)), c

    def scalings(self, K: Array, r: Array, pairs: Any) -> Scalings:
        """Return the scalings r and c after `pairs` pairs of steps, which run in a loop; `r` is the first row scaling."""
        return lax.fori_loop(0, pairs, lambda _, scalings: self.pair(K, scalings), (r, jnp.ones_like(r)))

    def undo_pair(self, K: Array, bars: Scalings, after: Scalings, before: Scalings) -> tuple[Scalings, Array]:
        """Undo a pair of steps: return the gradients of the scalings `before` it, and its share of the gradient of K.

        `bars` are the gradients of the scalings `after` the pair.
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
        """Return the gradient of the logits from the gradients of K and r of `first_step`.

        `Q` is the column softmax, which is used only if eps > 0.
        """
        if self.eps == 0:
            return self.keep(K_bar * K)
        S = (K_bar - (r_bar * r * r)[:, None]) * Q
        return S - self.columns(S, jnp.ones_like(r))[None] * Q
