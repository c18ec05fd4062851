r"""Sinkhorn-Knopp as the papers write it: mHC (arXiv 2512.24880) Eq. 9, and DeepSeek-V4's variant with an epsilon.

    $M^{(0)} = \exp(\tilde H)$,  $M^{(t)} = T_r(T_c(M^{(t-1)}))$,  $H^{res} = M^{(t_{max})}$

$T_c$ divides each column by its sum, and then $T_r$ divides each row by its sum.  The matrix `comb` of DeepSeek-V4's code is the
transpose of $H^{res}$, so its code ends with columns.
"""

from __future__ import annotations

import jax
from jax import Array, lax


def sinkhorn(logits: Array, num_iters: int = 20, eps: float = 0.0, axes: tuple[int, int] = (0, 1)) -> Array:
    """Return H_res, the doubly stochastic matrices made of `logits`, in which `axes` are the axes of rows and columns.

    Tests compare the gradient that JAX makes of this function with the one in `steps.py`, which training uses.

    The paper has eps = 0.  DeepSeek-V4 adds eps = 1e-6 to every entry after the first column step, and to every later divisor.
    """
    rows, columns = axes

    def column_step(M):
        return M / (M.sum(rows, keepdims=True) + eps)

    def row_step(M):
        return M / (M.sum(columns, keepdims=True) + eps)

    # The softmax over each column is exp(logits) after a column step without epsilon.
    M = row_step(jax.nn.softmax(logits, rows) + eps)
    return lax.fori_loop(1, num_iters, lambda _, M: row_step(column_step(M)), M)
