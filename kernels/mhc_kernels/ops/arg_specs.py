"""Workloads with the sizes of real models, and random arguments for each operation on them, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import mhc_kernels
from mhc_kernels import Coefficients

OPS = ("sinkhorn", "coefficients", "read", "write", "write_read")


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """A workload: the number of tokens N, the number of streams n, and the width C of a stream."""

    name: str
    tokens: int
    num_streams: int
    width: int
    dtype: str = "bfloat16"
    """Dtype of the streams; coefficients are float32."""

    def __str__(self) -> str:
        return f"{self.name} ({self.tokens} x {self.num_streams} x {self.width}, {self.dtype})"


SPECS = {
    spec.name: spec
    for spec in (
        ArgSpec("tiny", 40, 4, 128, "float32"),
        ArgSpec("tiny-bf16", 40, 4, 128),
        ArgSpec("tiny-ragged", 37, 2, 128, "float32"),
        # Models of mHC Table 5.  16384 tokens are four sequences of 4096 tokens.
        ArgSpec("3b", 16384, 4, 1280),
        ArgSpec("9b", 16384, 4, 1920),
        ArgSpec("27b", 16384, 4, 2560),
        ArgSpec("27b-4k", 4096, 4, 2560),
        ArgSpec("27b-64k", 65536, 4, 2560),
        ArgSpec("27b-n2", 16384, 2, 2560),
        ArgSpec("27b-n8", 16384, 8, 2560),
        ArgSpec("27b-ragged", 16301, 4, 2560),
        ArgSpec("27b-fp32", 8192, 4, 2560, "float32"),
        # DeepSeek-V4 Flash and DeepSeek-V4; TransformerEngine publishes times of its kernels on the same shapes.
        ArgSpec("v4-flash", 8192, 4, 4096),
        ArgSpec("v4", 8192, 4, 7168),
        ArgSpec("v4-32k", 32768, 4, 7168),
    )
}
"""Workloads by name; a name that begins with `tiny` is for tests and for machines without an accelerator."""


def arguments(op: str, spec: ArgSpec, key: Array) -> tuple[Array, ...]:
    """Draw random arguments for one call of the operation `op`.

    The arguments of each operation: sinkhorn (logits[n, n, N]); coefficients (x[N, nC], phi[nC, k], alpha[3], bias[k]);
    read (x, pre[n, N]); write (x, y[N, C], post[n, N], res[n, n, N]); write_read (x, y, post, res, phi, alpha, bias).

    logits, x, y and bias are standard normal.  phi is N(0, 1 / nC), so that the projected streams have a standard deviation near 1.
    alpha is constant.  As in a model, pre is between 0 and 1, post is between 0 and 2, and res is doubly stochastic.
    """
    n, N, C = spec.num_streams, spec.tokens, spec.width
    k = n * n + 2 * n
    keys = dict(zip(("x", "y", "pre", "post", "res", "phi", "bias"), jax.random.split(key, 7), strict=True))
    made: dict[str, Callable[[], Array]] = {
        "logits": lambda: jax.random.normal(keys["res"], (n, n, N)),
        "x": lambda: jax.random.normal(keys["x"], (N, n * C), spec.dtype),
        "y": lambda: jax.random.normal(keys["y"], (N, C), spec.dtype),
        "pre": lambda: jax.random.uniform(keys["pre"], (n, N)),
        "post": lambda: 2 * jax.random.uniform(keys["post"], (n, N)),
        "res": lambda: mhc_kernels.sinkhorn(jax.random.normal(keys["res"], (n, n, N)), implementation="xla"),
        "phi": lambda: jax.random.normal(keys["phi"], (n * C, k)) / math.sqrt(n * C),
        "alpha": lambda: jnp.asarray([0.8, 0.9, 1.0]),
        "bias": lambda: jax.random.normal(keys["bias"], (k,)),
    }
    return tuple(made[name]() for name in ARGUMENTS[op])


ARGUMENTS = {
    "sinkhorn": ("logits",),
    "coefficients": ("x", "phi", "alpha", "bias"),
    "read": ("x", "pre"),
    "write": ("x", "y", "post", "res"),
    "write_read": ("x", "y", "post", "res", "phi", "alpha", "bias"),
}
"""Names of the arguments of each operation, in the order of the call."""

OUTPUTS = {
    "sinkhorn": ("res",),
    "coefficients": ("pre", "post", "res"),
    "read": ("h",),
    "write": ("x'",),
    "write_read": ("x'", "pre", "post", "res", "h"),
}
"""Names of the outputs of each operation, in the order that it returns them."""


def function(op: str, spec: ArgSpec, implementation: str | None) -> Callable[..., tuple[Array, ...]]:
    """Return an operation as a function from the arrays `ARGUMENTS[op]` to the tuple of arrays `OUTPUTS[op]`.

    Args:
      op: name of the operation.
      spec: workload.
      implementation: value of the argument `implementation` of the operation, or `reference` for `ops/<op>/reference.py`.
    """
    if implementation == "reference":
        run = getattr(importlib.import_module(f"mhc_kernels.ops.{op}.reference"), op)
        options: dict[str, Any] = {"stream_dtype": spec.dtype} if op == "write_read" else {}
    else:
        run, options = getattr(mhc_kernels, op), {"implementation": implementation}
    if op != "sinkhorn":
        options["num_streams"] = spec.num_streams

    def flat(*arrays: Array) -> tuple[Array, ...]:
        if op != "write_read":
            return tuple(jax.tree.leaves(run(*arrays, **options)))
        x, y, post, res, *parameters = arrays
        return tuple(jax.tree.leaves(run(x, Coefficients(None, post, res), y, *parameters, **options)))

    return flat


def shapes(op: str, spec: ArgSpec) -> tuple[Any, Any]:
    """Return the shapes and dtypes of the arguments and of the outputs, as `jax.ShapeDtypeStruct`."""
    given = jax.eval_shape(lambda: arguments(op, spec, jax.random.key(0)))
    return given, jax.eval_shape(function(op, spec, "xla"), *given)


def program(f: Callable[..., tuple[Array, ...]], backward: bool) -> Callable[..., tuple[Array, ...]]:
    """Return a function of (arguments, cotangents) that returns the outputs of f, and then the gradients if `backward` is true."""

    def forward_backward(given: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
        out, pull = jax.vjp(f, *given)
        return *out, *pull(cotangents)

    return forward_backward if backward else lambda given, cotangents: f(*given)


def floor_bytes(op: str, spec: ArgSpec, backward: bool) -> int:
    """Return the bytes that an operation must move, forward or forward + backward, if each pass touches every array once.

    The forward pass reads the arguments and writes the outputs.  The backward pass reads the arguments and the cotangents of the
    outputs, and writes the gradients of the arguments.  So both passes together move three times the arguments and twice the
    outputs.  A kernel that saves more than the arguments for its backward pass moves more.  The table has the numbers of elements
    of x, y, h and x' that move for each token (mHC section 4.3), without the coefficients:

        operation     forward      both
        coefficients  n C          3 n C
        read          (n + 1) C    (3 n + 2) C
        write         (2 n + 1) C  (5 n + 3) C
        write_read    (2 n + 2) C  (5 n + 5) C
    """
    read, written = (sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays) for arrays in shapes(op, spec))
    return 3 * read + 2 * written if backward else read + written
