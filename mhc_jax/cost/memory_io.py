r"""Numbers of elements that the operations of a connection read and write, counted by hand (mHC Table 2).

All numbers are per token and sub-layer, for the forward pass without the branch F.  The connection has n streams of width C.
"""

from __future__ import annotations

from typing import NamedTuple


class Moved(NamedTuple):
    """Numbers of elements per token that an operation reads from memory and writes to it."""

    read: int
    written: int


def residual(C: int) -> Moved:
    """Count the elements that the residual connection, x + y, moves (mHC Table 2, first row)."""
    return Moved(2 * C, C)


def unfused(n: int, C: int) -> dict[str, Moved]:
    r"""Count the elements that each operation moves if it is a kernel of its own (mHC Table 2).

    In all $(5n + 1)C + n^2 + 2n$ elements are read and $(3n + 1)C + n^2 + 2n$ are written.
    """
    return {
        "coefficients": Moved(n * C, n**2 + 2 * n),
        "apply H_pre": Moved(n * C + n, C),
        "apply H_post": Moved(C + n, n * C),
        "apply H_res": Moved(n * C + n**2, n * C),
        "merge": Moved(2 * n * C, n * C),
    }


def merged(n: int, C: int) -> dict[str, Moved]:
    """Count the elements that each operation moves if H_post, H_res and the merge are one kernel (mHC section 4.3).

    The merged kernel reads (n + 1)C elements instead of (3n + 1)C, and writes nC elements instead of 3nC.
    """
    rows = unfused(n, C)
    return {key: rows[key] for key in ("coefficients", "apply H_pre")} | {
        "write": Moved((n + 1) * C + n**2 + n, n * C),
    }


def total(rows: dict[str, Moved]) -> Moved:
    """Add up the elements of all operations."""
    return Moved(sum(row.read for row in rows.values()), sum(row.written for row in rows.values()))


def boundary(n: int, C: int) -> dict[str, int]:
    """Count the elements read plus written between two branches, with the pre-norm and without the coefficients themselves.

    `three kernels`, (4n + 4)C: statistics and coefficients read nC.  The read takes nC and gives C.  The write takes (n + 1)C and
    gives nC.  The pre-norm takes C and gives C.
    `statistics in the write`, (3n + 2)C: the statistics are taken while x is written, and the norm is part of the read.
    `one pass`, (2n + 2)C: x and y are touched once each.  No implementation can move less.
    """
    return {"three kernels": (4 * n + 4) * C, "statistics in the write": (3 * n + 2) * C, "one pass": (2 * n + 2) * C}
