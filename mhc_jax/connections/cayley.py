"""The Cayley transform, which makes orthogonal matrices of skew-symmetric ones, for one small matrix of each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(a: Float[Array, "m m *tokens"], b: Float[Array, "m m *tokens"]) -> Float[Array, "m m *tokens"]:
    """Multiply two matrices of each token in full float32, which the matrix unit of a TPU would round.  Token axes stay last.

    It is a sum of m products, one after another.  As one sum over an axis, XLA's CPU backend loses digits from some 20,000 tokens
    on (jax 0.10.2): rows of H_res of go-mHC then sum to 1 within 1e-3 only.
    """
    total = a[:, 0, None] * b[None, 0]
    for j in range(1, len(a)):
        total = total + a[:, j, None] * b[None, j]
    return total


@jax.custom_vjp
def cayley(A: Float[Array, "m m *tokens"]) -> Float[Array, "m m *tokens"]:
    r"""Return the orthogonal matrix $Q = (I - A)(I + A)^{-1} = 2 M - I, \; M = (I + A)^{-1}$, of a skew-symmetric A, float32.

    M comes from Gauss-Jordan elimination without pivoting, whose pivots are at least 1, because the symmetric part of I + A is I.
    Large A cost it digits (1e-4 of Q for logits of 80), which one Newton step $M + M (I - (I + A) M)$ restores.  One Newton-Schulz
    step $Q + \frac{1}{2} Q (I - Q^\top Q)$ makes Q orthogonal to rounding.  The gradient is that of the formula and not of these
    steps: $\bar A = -\frac{1}{2} (I + Q)^\top \bar Q (I + Q)^\top$.  The tests hold for entries of A up to 80.
    Far larger entries, from about 1e4 on, cost Q digits, and near 1e20 they overflow.

    Examples:
      For m = 2 it is a rotation, here by a right angle.

      >>> import jax.numpy as jnp
      >>> print(cayley(jnp.array([[0.0, 1.0], [-1.0, 0.0]])))
      [[ 0. -1.]
       [ 1.  0.]]
    """
    m = len(A)
    unit = jnp.eye(m, dtype=A.dtype).reshape(m, m, *(1,) * (A.ndim - 2))

    index = jnp.arange(m).reshape(m, *(1,) * (A.ndim - 2))

    def eliminate(k: Array, a: Array) -> Array:
        """One step of the elimination, in place: the columns before k are already those of the inverse."""
        here = index == k
        row = jnp.where(here, 1.0, a[k]) / a[k, k][None]
        rest = jnp.where(here[None], 0.0, a) - a[:, k][:, None] * row[None]
        return jnp.where(here[:, None], row[None], rest)

    M = jax.lax.fori_loop(0, m, eliminate, unit + A)
    M = M + product(M, unit - product(unit + A, M))
    Q = 2 * M - unit
    return Q + 0.5 * product(Q, unit - product(Q.swapaxes(0, 1), Q))


def _cayley_forward(A: Array) -> tuple[Array, Array]:
    Q = cayley(A)
    return Q, Q


def _cayley_backward(Q: Array, gradient: Array) -> tuple[Array]:
    m = len(Q)
    transposed = Q.swapaxes(0, 1) + jnp.eye(m, dtype=Q.dtype).reshape(m, m, *(1,) * (Q.ndim - 2))
    return (-0.5 * product(product(transposed, gradient), transposed),)


cayley.defvjp(_cayley_forward, _cayley_backward)
