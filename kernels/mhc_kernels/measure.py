"""Check and time the operations, for `kernels/bench.py` and `experiments/device_report.py`.

An implementation is timed only if its results agree with a float64 reference; the function `gate` makes this accuracy check.
Implementations take turns (A B B A), and each timed batch of calls follows an untimed one.  Inputs rotate over more memory than
any cache holds.  The time is the median over rounds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mhc_kernels import backends
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec, arguments, floor_bytes, function, program, shapes

GATE_TOKENS = 269
"""Number of tokens in the accuracy check: a prime, so that no block size divides it, and more than two blocks of 128 tokens."""
FLOAT32_TOLERANCE = 1e-5
STREAM_TOLERANCE = 2.0**-6
"""Largest allowed relative error of results that depend on streams rounded to bfloat16: two units in the last place of bfloat16."""
ROTATION_BYTES = 256 * 2**20
"""Size in bytes that all sets of inputs together reach, except for `tiny` workloads.  Timed calls take the sets in turn.

The size is over twice the largest second-level cache (126 MB, of a B200), so that a call does not find its inputs in cache."""
BATCH_SECONDS = 0.02
"""Approximate length of a timed batch in seconds, beside which the latency of a dispatch (tens of microseconds) is small."""

Sets = Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]]
"""Sets of inputs, each a pair (arguments of a call, cotangents of its outputs), which successive calls take in turn."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """How `alternating` runs one implementation: it starts several dispatches of work to the device, and waits for the last."""

    launch: Callable[[int], Any]
    """launch(k) starts dispatch number k, which calls the operation `calls` times, and returns the argument of `wait`."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    calls: int = 1


@runtime_checkable
class Implementation(Protocol):
    """The interface of an implementation in a benchmark: a backend of mhc_kernels, or a peer from another project."""

    @property
    def name(self) -> str:
        """Name of the implementation, as the option `--implementations` takes it."""
        ...

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Return why the implementation cannot run this operation and workload on this machine, or None if it can."""
        ...

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Return the outputs for sets[0], followed by the gradients of its arguments if `backward` is true."""
        ...

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch whose dispatches make `calls` calls each, forward or forward + backward, on `sets` in rotation."""
        ...


@dataclasses.dataclass(frozen=True)
class Ours:
    """A backend of mhc_kernels in a benchmark; `name` is the value of the argument `implementation` that chooses it."""

    name: str

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Trace the call, and return why the backend cannot run it (the error of `backend_choice.choose`), or None if it can."""
        try:
            jax.eval_shape(function(op, spec, self.name), *shapes(op, spec)[0])
        except ValueError as error:
            return str(error).partition("cannot run this: ")[2].partition(". Here")[0] or str(error)
        return None

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Compute outputs and gradients for sets[0] in one program; see `Implementation`."""
        out = jax.jit(program(function(op, spec, self.name), backward))(*sets[0])
        return [np.asarray(a) for a in out]

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch whose dispatches are one program each, in which a call waits for the one before; see `Implementation`."""
        run = program(function(op, spec, self.name), backward)

        def several(group):
            out, done = [], ()
            for arrays in group:
                arrays, done = jax.lax.optimization_barrier((arrays, done))
                out.append(done)
                done = run(*arrays)
            return out, done

        compiled = jax.jit(several)
        groups = [tuple(sets[k : k + calls]) for k in range(0, len(sets), calls)]
        return Batch(lambda k: compiled(groups[k % len(groups)]), calls=calls)


def implementations(op: str) -> list[Implementation]:
    """Return `xla` and every backend with kernels for the operation, whether or not this machine can run them."""
    return [Ours("xla"), *(Ours(name) for name in backends.BACKENDS[op])]


def make_sets(op: str, spec: ArgSpec, count: int) -> Sets:
    """Draw `count` pairs of random arguments and cotangents for calls of an operation; all pairs differ."""
    _, outputs = shapes(op, spec)

    @jax.jit
    def make(key):
        given, *rest = jax.random.split(key, 1 + len(outputs))
        normal = (jax.random.normal(k, s.shape, s.dtype) for k, s in zip(rest, outputs, strict=True))
        return arguments(op, spec, given), tuple(normal)

    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


# ----------------------------------------------------------------------------------------------------------- accuracy


@dataclasses.dataclass(frozen=True)
class Gate:
    """Result of the accuracy check of an implementation: by name of each array, its error and the largest error allowed.

    The error of an array is its largest |difference| from the float64 reference, divided by the largest |entry| of the reference.
    """

    errors: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is at most what is allowed; an error of NaN is not."""
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    @property
    def worst(self) -> str:
        """Name of the array whose error is the largest multiple of the allowed error."""
        return max(
            self.errors, key=lambda name: math.inf if math.isnan(e := self.errors[name]) else e / self.allowed[name]
        )


def float64_results(op: str, spec: ArgSpec, given: Sequence[Any], cotangents: Sequence[Any]) -> list[np.ndarray]:
    """Return the outputs of a call, then the gradients of its arguments, from `reference.py` in float64 on the host's CPU.

    Raises:
      RuntimeError: the environment variable JAX_PLATFORMS leaves the CPU out.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        sets = (tuple(jnp.asarray(np.asarray(a, np.float64)) for a in arrays) for arrays in (given, cotangents))
        return [np.asarray(a) for a in jax.jit(program(function(op, spec, "reference"), True))(*sets)]


def gate(op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0) -> Gate:
    """Check the accuracy of an implementation: compare its outputs and gradients with float64 on a small number of tokens.

    Args:
      op: name of the operation.
      spec: workload, of which at most `GATE_TOKENS` tokens are used.
      implementation: the implementation to check.
      loosest: an error up to this value is always allowed, for peers that compute in lower precision by design; 0 allows no more
        than our own backends may have.

    Raises:
      ValueError: a result has the wrong shape.
    """
    small = dataclasses.replace(spec, tokens=min(spec.tokens, GATE_TOKENS))
    sets = make_sets(op, small, 1)
    expected = float64_results(op, small, *sets[0])
    names = [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])]
    dtypes = [a.dtype for part in (sets[0][1], sets[0][0]) for a in part]
    errors = dict.fromkeys(names, 0.0)
    # The forward pass alone may be another program than the one that saves arrays for a backward pass, so both are checked.
    for backward in (False, True):
        actual = implementation.results(op, small, sets, backward)
        for name, a, b in zip(names[: len(actual)], actual, expected[: len(actual)], strict=True):
            if a.shape != b.shape:
                raise ValueError(f"{op}: {implementation.name} returns {name} of shape {a.shape}, not {b.shape}.")
            error = np.abs(np.asarray(a, np.float64) - b).max() / max(float(np.abs(b).max()), 1e-30)
            errors[name] = float(np.maximum(errors[name], error))  # np.maximum keeps a NaN, unlike max
    allowed = {}
    for name, dtype in zip(names, dtypes, strict=True):
        exact_inputs = dtype == jnp.float32 and (op != "write_read" or spec.dtype == "float32")
        allowed[name] = max(FLOAT32_TOLERANCE if exact_inputs else STREAM_TOLERANCE, loosest)
    return Gate(errors, allowed)


def attempt(
    op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0, known: Gate | None = None
) -> tuple[str, Gate | None]:
    """Check the accuracy of an implementation with `gate`, and return a status and the result of the check.

    The status is `ok`, `FAILED` if an error is too large, or else the reason why there is no result.  The first four arguments are
    those of `gate`.  `known` is the result of an earlier check of this implementation, or None, which makes the check now.
    """
    obstacle = implementation.obstacle(op, spec)
    if obstacle is not None:
        return obstacle, None
    try:
        result = known or gate(op, spec, implementation, loosest)
    except Exception as error:  # one kernel that fails to compile must not end the whole benchmark
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    return "ok" if result.passed else "FAILED", result


# ------------------------------------------------------------------------------------------------------------- timing


def alternating(batches: Mapping[str, Batch], rounds: int, seconds: float = BATCH_SECONDS) -> dict[str, list[float]]:
    """Time several implementations in turn, and return for each of them the seconds of one call in every round.

    Each round runs all implementations, and the order is reversed from round to round.  Before each timed batch, the same
    implementation runs one untimed dispatch, which finds caches and pages as another implementation left them.

    Args:
      batches: the implementations by name.
      rounds: number of rounds.
      seconds: approximate length of each timed batch.
    """
    repeats = {}
    for name, batch in batches.items():
        batch.wait(batch.launch(0))
        began = time.perf_counter()
        batch.wait(batch.launch(1))
        repeats[name] = max(1, min(200, round(seconds / (time.perf_counter() - began))))
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds):
        for name in list(batches) if turn % 2 else list(batches)[::-1]:
            batch, last = batches[name], None
            batch.wait(batch.launch(0))
            began = time.perf_counter()
            for k in range(repeats[name]):
                last = batch.launch(k + 1)
            batch.wait(last)
            times[name].append((time.perf_counter() - began) / (repeats[name] * batch.calls))
    return times


def copy_bandwidth(rounds: int) -> float:
    """Return how many bytes per second x + 1 reads and writes on this device, for a float32 x of 1 GiB (256 MiB on a CPU)."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = alternating({"copy": Batch(lambda k: copy(x))}, rounds)["copy"]
    return 2 * x.nbytes / statistics.median(times)


def rotation(set_bytes: int) -> tuple[int, int]:
    """Return the number of calls in a dispatch, and the number of sets of inputs, for sets of `set_bytes` bytes each.

    A dispatch makes so many calls that their inputs fill ROTATION_BYTES, but at most 16.  On a CPU it makes one call, because the
    cost of a dispatch is small beside a call there.  All sets together fill ROTATION_BYTES, but there are at most 512 sets, so the
    inputs of the `tiny` workloads stay in cache.
    """
    calls = 1 if jax.default_backend() == "cpu" else min(16, math.ceil(ROTATION_BYTES / set_bytes))
    return calls, calls * min(512 // calls, max(2, math.ceil(ROTATION_BYTES / (calls * set_bytes))))


def measure(
    op: str,
    spec: ArgSpec,
    contestants: Sequence[Implementation],
    rounds: int,
    copy: float,
    loosest: Mapping[str, float] = {},
    known: Mapping[str, Gate] = {},
) -> Iterator[dict[str, Any]]:
    """Check and time implementations of one operation on one workload, first forward, then forward + backward.

    Args:
      op: name of the operation.
      spec: workload.
      contestants: the implementations, such as `implementations(op)` and any peers.
      rounds: number of rounds.
      copy: the result of `copy_bandwidth` in the same run.
      loosest: the argument `loosest` of `gate` for some implementations, by name; 0 for the others.
      known: results of accuracy checks that have been made already on this workload, by name of the implementation.

    Yields:
      For each pass, one row for each implementation that is timed: `op`, `pass`, `spec` (its fields), `implementation`, `status`
      (`ok`), `ms`, `ms_rounds`, `bytes` (see `floor_bytes`), `copy_share` (bytes per second over `copy`), `errors` and `worst`
      (see `Gate`).  After them, one row for each implementation that is not timed.  Its `status` says why: `FAILED` if an error is
      too large, the message of an exception, or what the implementation does not support.
    """
    status: dict[str, str] = {}
    gates: dict[str, Gate] = {}
    for c in contestants:
        status[c.name], result = attempt(op, spec, c, loosest.get(c.name, 0.0), known.get(c.name))
        if result is not None:
            gates[c.name] = result
    common = {"op": op, "spec": dataclasses.asdict(spec)}
    gate_of = {name: {"errors": dict(g.errors), "worst": g.worst} for name, g in gates.items()}
    able = [c for c in contestants if status[c.name] == "ok"]
    calls, count = rotation(sum(math.prod(a.shape) * a.dtype.itemsize for a in shapes(op, spec)[0]))
    sets = make_sets(op, spec, count) if able else []
    for backward in (False, True):
        moved = floor_bytes(op, spec, backward)
        times = alternating({c.name: c.batch(op, spec, sets, calls, backward) for c in able}, rounds)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            yield {
                **common,
                "pass": "forward + backward" if backward else "forward",
                "implementation": name,
                "status": "ok",
                "ms": 1e3 * median,
                "ms_rounds": [1e3 * t for t in seconds],
                "bytes": moved,
                "copy_share": moved / median / copy,
                **gate_of[name],
            }
    for name, problem in status.items():
        if problem != "ok":
            yield {**common, "pass": "", "implementation": name, "status": problem, **gate_of.get(name, {})}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows of `measure` as a Markdown table."""
    lines = []
    for row in rows:
        error = f"{row['errors'][row['worst']]:.0e} ({row['worst']})" if "errors" in row else ""
        if row["status"] == "ok":
            figures = [f"{row['ms']:.3f}", f"{row['bytes'] / 1e9:.3f}", f"{100 * row['copy_share']:.0f} %"]
        else:
            figures = [row["status"], "", ""]
        lines.append([row["op"], row["pass"], ArgSpec(**row["spec"]), row["implementation"], *figures, error])
    return markdown("op | pass | workload | implementation | ms | GB | of copy | error", lines)


def markdown(header: str, lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table of `lines`; `header` has the names of the columns, with a bar (|) between two names."""
    columns = header.count("|") + 1
    return "\n".join(
        [f"| {header} |", "| --- " * columns + "|", *("| " + " | ".join(map(str, c)) + " |" for c in lines)]
    )
