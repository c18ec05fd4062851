"""Check and time the operations, for `kernels/bench.py` and `experiments/device_report.py`.

Only an implementation that has passed its gate, a comparison with float64, is timed.  Implementations alternate (ABBA), and each
timed batch follows an untimed call.  Inputs rotate over more memory than any cache holds.  The result is a median of rounds.
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
"""Number of tokens at the gate: a prime, so that no block size divides it, and more than two blocks of 128."""
FLOAT32_TOLERANCE = 1e-5
STREAM_TOLERANCE = 2.0**-6
"""Bound of the relative error of results that depend on rounded streams: two units in the last place of bfloat16."""
ROTATION_BYTES = 256 * 2**20
"""Least bytes of inputs that calls rotate over: more than twice the largest second-level cache (126 MB, of a B200)."""
BATCH_SECONDS = 0.02
"""Approximate seconds of a timed batch, so long that the latency of a dispatch (tens of microseconds) does not count."""

Sets = Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]]
"""Pairs (arguments of a call, cotangents of its outputs), one pair for each call."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The dispatches of one contestant, as `alternating` times them."""

    launch: Callable[[int], Any]
    """Starts dispatch number k, which makes `calls` calls of the operation, and returns an object for `wait`."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    calls: int = 1


@runtime_checkable
class Implementation(Protocol):
    """The interface of a contestant in a benchmark, which peers in other frameworks have too."""

    @property
    def name(self) -> str:
        """Name of the contestant, as the option `--implementations` takes it."""
        ...

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Say why the contestant cannot run this call on this machine; None means that it can."""
        ...

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Compute the outputs for the first set, and after them the gradients of its arguments if `backward` is true."""
        ...

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch of which each dispatch makes `calls` calls, on `sets` in rotation."""
        ...


@dataclasses.dataclass(frozen=True)
class Ours:
    """The contestant that is a backend of mhc_kernels; `name` is its name for the argument `implementation`."""

    name: str

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Trace the call, and return the reason in the error that `mhc_kernels.backend_choice.choose` raises, or None."""
        try:
            jax.eval_shape(function(op, spec, self.name), *shapes(op, spec)[0])
        except ValueError as error:
            return str(error).partition("cannot run this: ")[2].partition(". Here")[0] or str(error)
        return None

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Compute outputs and gradients of the first set in one program; see `Implementation`."""
        out = jax.jit(program(function(op, spec, self.name), backward))(*sets[0])
        return [np.asarray(a) for a in out]

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch of which each dispatch is one program: a call in it waits for the call before it; see `Implementation`."""
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
    """List `xla` and every backend with kernels for the operation, whether or not this machine can run it."""
    return [Ours("xla"), *(Ours(name) for name in backends.BACKENDS[op])]


def make_sets(op: str, spec: ArgSpec, count: int) -> Sets:
    """Draw random arguments and cotangents for `count` calls; all sets differ."""
    _, outputs = shapes(op, spec)

    @jax.jit
    def make(key):
        given, *rest = jax.random.split(key, 1 + len(outputs))
        normal = (jax.random.normal(k, s.shape, s.dtype) for k, s in zip(rest, outputs, strict=True))
        return arguments(op, spec, given), tuple(normal)

    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


# --------------------------------------------------------------------------------------------------------------- gate


@dataclasses.dataclass(frozen=True)
class Gate:
    """Errors of the results of a contestant, by name of the result, and their bounds.

    An error is the largest |difference| from float64 over the largest |entry| in float64.
    """

    errors: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound; an error of NaN is not."""
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    @property
    def worst(self) -> str:
        """Name of the result that is nearest to its bound, or furthest above it."""
        return max(
            self.errors, key=lambda name: math.inf if math.isnan(e := self.errors[name]) else e / self.allowed[name]
        )


def float64_results(op: str, spec: ArgSpec, given: Sequence[Any], cotangents: Sequence[Any]) -> list[np.ndarray]:
    """Compute the outputs, then the gradients of the arguments, with the reference in float64 on the host's CPU.

    Raises:
      RuntimeError: JAX_PLATFORMS leaves the CPU out.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        sets = (tuple(jnp.asarray(np.asarray(a, np.float64)) for a in arrays) for arrays in (given, cotangents))
        return [np.asarray(a) for a in jax.jit(program(function(op, spec, "reference"), True))(*sets)]


def gate(op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0) -> Gate:
    """Compare outputs and gradients of an implementation with float64, on a small number of tokens.

    Args:
      op: name of the operation.
      spec: workload; its tokens are cut to `GATE_TOKENS`.
      implementation: contestant.
      loosest: least bound of every error, for contestants that compute in lower precision by design; 0 keeps our bounds.
    """
    small = dataclasses.replace(spec, tokens=min(spec.tokens, GATE_TOKENS))
    sets = make_sets(op, small, 1)
    expected = float64_results(op, small, *sets[0])
    names = [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])]
    dtypes = [a.dtype for part in (sets[0][1], sets[0][0]) for a in part]
    errors = dict.fromkeys(names, 0.0)
    # A forward pass alone may be another program than a forward pass that saves arrays for the backward pass.
    for backward in (False, True):
        actual = implementation.results(op, small, sets, backward)
        for name, a, b in zip(names[: len(actual)], actual, expected[: len(actual)], strict=True):
            if a.shape != b.shape:
                raise ValueError(f"{op}: {implementation.name} returns {name} of shape {a.shape}, not {b.shape}.")
            error = np.abs(np.asarray(a, np.float64) - b).max() / max(float(np.abs(b).max()), 1e-30)
            errors[name] = float(np.maximum(errors[name], error))  # `maximum` keeps a NaN
    allowed = {}
    for name, dtype in zip(names, dtypes, strict=True):
        exact_inputs = dtype == jnp.float32 and (op != "write_read" or spec.dtype == "float32")
        allowed[name] = max(FLOAT32_TOLERANCE if exact_inputs else STREAM_TOLERANCE, loosest)
    return Gate(errors, allowed)


def attempt(
    op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0, known: Gate | None = None
) -> tuple[str, Gate | None]:
    """Run the gate, and return a status (`ok`, `FAILED`, or why there is no gate) and the gate.

    The first four arguments are those of `gate`.  `known` is the result of a gate that has run already; None runs it.
    """
    obstacle = implementation.obstacle(op, spec)
    if obstacle is not None:
        return obstacle, None
    try:
        result = known or gate(op, spec, implementation, loosest)
    except Exception as error:  # if one kernel fails to compile, the other contestants must keep their rows
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    return "ok" if result.passed else "FAILED", result


# ------------------------------------------------------------------------------------------------------------- timing


def alternating(batches: Mapping[str, Batch], rounds: int, seconds: float = BATCH_SECONDS) -> dict[str, list[float]]:
    """Time the contestants, and return the seconds of a call in each round, by contestant.

    Every round runs all contestants, in an order that alternates.  Each timed batch follows an untimed dispatch of the same
    contestant, because the first dispatch pays for the caches and pages that another contestant left behind.
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
    """Measure the bytes that x + 1 reads and writes per second, with x of 1 GiB in float32 (256 MiB on a CPU)."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = alternating({"copy": Batch(lambda k: copy(x))}, rounds)["copy"]
    return 2 * x.nbytes / statistics.median(times)


def rotation(set_bytes: int) -> tuple[int, int]:
    """Return the number of calls in a dispatch and the number of sets, for sets of `set_bytes` bytes.

    A dispatch moves ROTATION_BYTES or makes 16 calls, and all sets together fill ROTATION_BYTES.  On a CPU, a dispatch is one call,
    because its own cost is small beside a call.  There are at most 512 sets, so the `tiny` workloads stay in cache.
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
    """Measure one operation on one workload: a row for each contestant, first forward, then forward + backward.

    Args:
      op: name of the operation.
      spec: workload.
      contestants: `implementations(op)` and any peers.
      rounds: number of rounds.
      copy: bytes per second of `copy_bandwidth` in the same run.
      loosest: error that a contestant may have by its name, for contestants that compute in lower precision by design.
      known: results of gates that have run already on this workload, by name of the contestant.

    Yields:
      Rows of timed contestants: `op`, `pass`, `spec` (its fields), `implementation`, `status` (`ok`), `ms`, `ms_rounds`,
      `bytes` (see `floor_bytes`), `copy_share` (bytes per second over `copy`), `errors` and `worst` (see `Gate`).  After them,
      one row for each contestant that is not timed.  Its `status` says why: `FAILED` at the gate, an error, or what the
      contestant does not support.
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
    """Format a Markdown table; `header` has the names of its columns, with a bar (|) between two names."""
    columns = header.count("|") + 1
    return "\n".join(
        [f"| {header} |", "| --- " * columns + "|", *("| " + " | ".join(map(str, c)) + " |" for c in lines)]
    )
