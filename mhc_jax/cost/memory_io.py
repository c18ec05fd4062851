r"""Numbers of elements that the operations of a connection read from and write to memory, by formula (mHC Table 2).

All numbers are per token and sub-layer, for the forward pass without the branch F.  The connection has n streams of width C.
"""

from __future__ import annotations

from typing import NamedTuple


class Moved(NamedTuple):
    """Numbers of elements per token that an operation reads from memory and writes to memory."""

    read: int
    written: int


def residual(C: int) -> Moved:
    """Count the elements that the residual connection, x + y, reads and writes (mHC Table 2, first row)."""
    return Moved(2 * C, C)


def unfused(n: int, C: int) -> dict[str, Moved]:
    r"""Count the elements that each operation reads and writes if each is a kernel of its own (mHC Table 2).

    The operation `merge` adds the results of H_post and H_res.  All operations together read
    $(5n + 1)C + n^2 + 2n$ elements and write $(3n + 1)C + n^2 + 2n$.
    """
    return {
        "coefficients": Moved(n * C, n**2 + 2 * n),
        "apply H_pre": Moved(n * C + n, C),
        "apply H_post": Moved(C + n, n * C),
        "apply H_res": Moved(n * C + n**2, n * C),
        "merge": Moved(2 * n * C, n * C),
    }


def merged(n: int, C: int) -> dict[str, Moved]:
    """Count the elements that each operation reads and writes if one kernel applies H_post and H_res and merges (mHC section 4.3).

    Beside the coefficients this kernel reads (n + 1)C elements instead of (3n + 1)C, and it writes nC elements instead of 3nC.
    """
    rows = unfused(n, C)
    return {key: rows[key] for key in ("coefficients", "apply H_pre")} | {
        "write": Moved((n + 1) * C + n**2 + n, n * C),
    }


def total(rows: dict[str, Moved]) -> Moved:
    """Return the sums of the elements that all operations in `rows` read and write."""
    return Moved(sum(row.read for row in rows.values()), sum(row.written for row in rows.values()))


def boundary(n: int, C: int) -> dict[str, int]:
    """Count the elements read plus written at one boundary, for three ways to divide it into kernels.

    The pre-norm of the branch is included, and the coefficients are not.  The statistics are the sums that make the coefficients:
    the projection of the streams, and the mean square for their RMSNorm.

    `three kernels`, (4n + 4)C: the statistics read nC.  The read reads nC and writes C.  The write reads (n + 1)C and writes nC.
    The pre-norm reads C and writes C.
    `statistics in the write`, (3n + 2)C: the statistics are computed while the streams are written, and the pre-norm in the read.
    `one pass`, (2n + 2)C: streams and branch output are read once, and streams and branch input are written once.  No
    implementation can move fewer elements.
    """
    return {"three kernels": (4 * n + 4) * C, "statistics in the write": (3 * n + 2) * C, "one pass": (2 * n + 2) * C}
