"""A hint for XLA's CPU backend."""

from __future__ import annotations

from jax import Array


def once(a: Array) -> Array:
    """`a`, divided by a 1 that only its own values know: the same numbers, and NaN where they are infinite or NaN.

    XLA:CPU computes sums and products again inside every consumer, transposes of them included, but a division once; and it
    removes `optimization_barrier` before it fuses.  Put where several consumers wait for something worth keeping; measured in
    experiments/LOG.md.
    """
    return a / (1 + 0 * a)
