r"""Random Sinkhorn problems of every hostile kind: values and marginals hold where the inputs are finite.

Gradients must be finite and proportional to the cotangent; tests/kernels hold their values.  The value of each problem is compared
with a float64 loop.  A rounding error $\delta$ of the logits moves $\log H^{res}$ by at most
$(4 t_{max} + 1)\, \delta$, because a step of Sinkhorn does not expand the supremum norm of the logarithms of the scalings.  The
bound for entries and column sums follows, with $\delta$ a few roundings of the largest difference of logits.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np

from campaign import processes
from campaign.trials import Part, Trial

FORMS = {"xla": (16, 31_250), "pallas_tpu": (8, 640), "pallas_gpu": (8, 640)}
"""For each form of the operation the largest n, and the number of problems of a trial."""
TRIALS = 32
"""Trials of each form: those of `xla` have 10^6 problems together, and those of the others 2 x 10^4 each."""
ITERATIONS = 20
ROUNDING = 2.0**-24
KINDS = (
    "normal",
    "uniform",
    "equal",
    "one-hot",
    "denormal",
    "mixed",
    "-inf",
    "row below",
    "+inf",
    "nan",
    "-inf column",
)
FINITE = KINDS[:8]
"""Kinds whose result must be finite: no NaN, no +inf, and a finite logit in every row and column."""


def part() -> Part:
    """Return the part of the campaign that is about numbers."""
    return Part("numerics", dict.fromkeys(FORMS, 1.0), _trial, weight=1, limit=TRIALS)


def _trial(trial: Trial, rng: random.Random) -> None:
    most, problems = FORMS[trial.case]
    index = int(trial.seed.rpartition("/")[2])
    n, dtype, eps = index % most + 1, ("float32", "bfloat16")[index // most % 2], rng.choice([0.0, 0.0, 1e-6])
    wrong = processes.call(lambda: check(trial.case, n, dtype, eps, problems, rng.getrandbits(32)))
    trial.tried = problems
    trial.moments = {f"{kind}": count for kind, count in wrong.pop("kinds").items()}
    if wrong:
        trial.fail("unlike", f"n {n}, {dtype}, eps {eps}: {wrong}")


def problems_of(n: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits [n, n, count], cotangents [n, n, count], and the kind of each problem as an index of `KINDS`."""
    r = np.random.default_rng(seed)
    kinds = r.integers(0, len(KINDS), count)
    scale = 10.0 ** r.uniform(-3, 4, count)
    logits = r.normal(size=(n, n, count)) * scale / 4
    for k, kind in enumerate(KINDS):
        at = np.flatnonzero(kinds == k)
        part = logits[..., at]
        if kind == "uniform":
            part = r.uniform(-1, 1, part.shape) * scale[at]
        elif kind == "equal":
            part = np.broadcast_to(r.choice([-1, 1], len(at)) * scale[at], part.shape)
        elif kind == "one-hot":
            part = np.eye(n)[r.permutation(n)][..., None] * r.choice([-1, 1], len(at)) * scale[at]
        elif kind == "denormal":
            part = r.integers(-9, 9, part.shape) * 1.4e-45
        elif kind == "mixed":
            part = r.normal(size=part.shape) * 10.0 ** r.uniform(-40, 3.3, part.shape)
        elif kind == "-inf":
            part = np.where((r.random(part.shape) < 0.3) & (np.eye(n)[..., None] == 0), -np.inf, part)
        elif kind == "row below":
            part[r.integers(n)] -= scale[at]
        elif kind in ("+inf", "nan"):
            part[r.integers(n), r.integers(n)] = np.inf if kind == "+inf" else np.nan
        elif kind == "-inf column":
            part[:, r.integers(n)] = -np.inf
        logits[..., at] = np.clip(part, -1e4, 1e4) if kind in KINDS[:6] + KINDS[7:8] else part
    return logits, r.normal(size=logits.shape), kinds


def check(form: str, n: int, dtype: str, eps: float, count: int, seed: int) -> dict[str, Any]:
    """Run problems through one form of the operation.  Return what is wrong by name, and `kinds`: problems by kind."""
    import jax
    import jax.numpy as jnp
    from mhc_kernels import settings, sinkhorn

    logits, cotangent, kinds = problems_of(n, count, seed)
    x = jnp.asarray(logits, jnp.dtype(dtype))
    G = np.asarray(cotangent, np.float32)
    exponent = np.random.default_rng(seed + 1).integers(-99, 100, count)  # 1e-30 to 1e30
    with settings(implementation=form, interpret=form != "xla"):

        @functools.partial(jax.jit, static_argnums=1)
        def run(x, eps, G, scaled):
            out, pull = jax.vjp(lambda a: sinkhorn(a, ITERATIONS, eps), x)
            return out, pull(G)[0].astype(jnp.float32), pull(scaled)[0].astype(jnp.float32)

        out, gradient, scaled = map(np.asarray, run(x, eps, G, np.ldexp(G, exponent).astype(np.float32)))
    good = kinds < len(FINITE)
    wrong = _wrong_values(np.asarray(x, np.float64), out.astype(np.float64), good, kinds, n, eps)
    wrong |= _wrong_gradients(gradient[..., good], scaled[..., good], exponent[good])
    found = {kind: int((kinds == k).sum()) for k, kind in enumerate(KINDS)}
    return {**{name: text for name, text in wrong.items() if text}, "kinds": found}


def _wrong_values(
    x: np.ndarray, out: np.ndarray, good: np.ndarray, kinds: np.ndarray, n: int, eps: float
) -> dict[str, str]:
    def some(bad: np.ndarray) -> str:
        """Return the number of bad problems and one of them as text."""
        at = np.flatnonzero(bad)
        return f"{len(at)} problems, such as {KINDS[kinds[at[0]]]} {x[..., at[0]].tolist()}" if len(at) else ""

    over_matrix = (0, 1)
    finite = np.isfinite(out).all(over_matrix)
    wrong = {"not finite": some(good & ~finite), "finite": some(~good & finite & (n > 1 or eps == 0))}
    wrong["negative"] = some(good & (out < 0).any(over_matrix))
    rows = np.abs(out.sum(1) - 1).max(0)
    wrong["rows"] = some(good & ~(rows <= 4 * n * ROUNDING + n * n * eps))
    with np.errstate(all="ignore"):
        expected = float64_sinkhorn(x, eps)
        known = np.where(np.isfinite(x), x, 0)
        delta = ROUNDING * (4 * (known.max(over_matrix) - known.min(over_matrix)) + 2 * n + 8)
        bound = np.expm1((4 * ITERATIONS + 1) * delta)
        entries = np.abs(out - expected) <= bound * expected + 1e-30 + 4 * ROUNDING
        columns = np.abs(out.sum(0) - expected.sum(0)) <= bound * expected.sum(0) + 4 * n * ROUNDING
    wrong["entries"] = some(good & ~entries.all(over_matrix))
    wrong["columns"] = some(good & ~columns.all(0))
    return wrong


def _wrong_gradients(gradient: np.ndarray, scaled: np.ndarray, exponent: np.ndarray) -> dict[str, str]:
    """Return what is wrong with gradients for cotangents G and 2^k G, of which the second must be 2^k times the first."""
    # Where a number on the way was denormal, its digits are lost.
    back = np.ldexp(scaled.astype(np.float64), -exponent)
    largest = np.abs(gradient).max((0, 1))
    lost = np.ldexp(np.full(exponent.shape, 2.0**-100), np.maximum(-exponent, 0))
    unlike = (np.abs(back - gradient) > 1e-5 * np.maximum(largest, 1e-12) + lost).any((0, 1))
    bad = {
        "gradients not finite": (~np.isfinite(gradient)).any((0, 1)),
        "scaled gradients not finite": (~np.isfinite(scaled)).any((0, 1)),
        "gradients not proportional": unlike & np.isfinite(scaled).all((0, 1)),
    }
    return {
        name: f"{at.sum()} problems, the first at a factor of 2^±{np.abs(exponent[at]).min()}"
        for name, at in bad.items()
        if at.any()
    }


def float64_sinkhorn(x: np.ndarray, eps: float) -> np.ndarray:
    """Return H_res in float64: the papers' steps, on a matrix whose every row and column has the largest entry 1 at the start."""
    column = x.max(0)
    shifted = x - column[None]
    if eps:
        M = np.exp(shifted)
        M = M / M.sum(0)[None] + eps
        M = M / (M.sum(1)[:, None] + eps)
        for _ in range(ITERATIONS - 1):
            M = M / (M.sum(0)[None] + eps)
            M = M / (M.sum(1)[:, None] + eps)
        return M
    row = shifted.max(1)
    K, r, c = np.exp(shifted - row[:, None]), np.exp(row), np.ones_like(column)
    for _ in range(ITERATIONS):
        c = 1 / (K * r[:, None]).sum(0)
        r = 1 / (K * c[None]).sum(1)
    return r[:, None] * K * c[None]
