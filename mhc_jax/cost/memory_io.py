"""What the connections move and keep, counted by hand: mHC Tables 2 and 3, Eq. 20.

Numbers are elements per token and sub-layer, forward, without the branch F; n streams of width C, L sub-layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mhc_jax.errors import require


class Moved(NamedTuple):
    """Elements per token between memory and chip."""

    read: int
    written: int


def residual(C: int) -> Moved:
    """x + y: mHC Table 2, first row."""
    return Moved(2 * C, C)


def unfused(n: int, C: int) -> dict[str, Moved]:
    """Every operation a kernel of its own: mHC Table 2.  The sum is ((5n + 1)C + n^2 + 2n, (3n + 1)C + n^2 + 2n)."""
    return {
        "coefficients": Moved(n * C, n**2 + 2 * n),
        "apply H_pre": Moved(n * C + n, C),
        "apply H_post": Moved(C + n, n * C),
        "apply H_res": Moved(n * C + n**2, n * C),
        "merge": Moved(2 * n * C, n * C),
    }


def merged(n: int, C: int) -> dict[str, Moved]:
    """H_post, H_res and the merge in one kernel (mHC section 4.3): (3n + 1)C read become (n + 1)C, 3nC written become nC."""
    rows = unfused(n, C)
    return {key: rows[key] for key in ("coefficients", "apply H_pre")} | {
        "write": Moved((n + 1) * C + n**2 + n, n * C),
    }


def total(rows: dict[str, Moved]) -> Moved:
    """Sum over operations."""
    return Moved(sum(row.read for row in rows.values()), sum(row.written for row in rows.values()))


def boundary(n: int, C: int) -> dict[str, int]:
    """Read plus written between two branches, the pre-norm included, coefficients left out.

    Three kernels: statistics and coefficients read nC; read nC, C written; write (n + 1)C read, nC written; pre-norm 2C.  With the
    statistics taken while x is written, and the norm in the read, (3n + 2)C; (2n + 2)C touches x and y once each and is the floor.
    """
    return {"three kernels": (4 * n + 4) * C, "statistics in the write": (3 * n + 2) * C, "one pass": (2 * n + 2) * C}


def recompute_elements(L_r: int, L: int, n: int, C: int) -> int:
    """Activations kept per token when x is stored every L_r-th sub-layer: nC ceil(L / L_r) + (n + 2)C L_r (mHC Eq. 20).

    The first term is what is stored, the second what lives while one block is recomputed.  The branch outputs y, which are
    stored too (C a sub-layer, as for `residual`), do not depend on L_r and are left out.

    Raises:
      InputError: L_r outside 1..L.
    """
    require(1 <= L_r <= L, f"L_r is {L_r}; give a number of sub-layers from 1 to L = {L}.")
    return n * C * math.ceil(L / L_r) + (n + 2) * C * L_r


def best_recompute(L: int, n: int) -> int:
    """The L_r with the smallest `recompute_elements`, about sqrt(nL / (n + 2)); the smaller of two that tie."""
    return min(range(1, L + 1), key=lambda L_r: recompute_elements(L_r, L, n, 1))
