"""Correctness gate and timing of the operations: the engine of `kernels/bench.py` and `experiments/device_report.py`.

A time is taken only of what has passed its gate.  Implementations alternate (ABBA), each timed batch follows an untimed
call, inputs rotate over more memory than any cache holds, and the result is a median of rounds.
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
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec, arguments, floor_bytes, function, program

GATE_TOKENS = 269
"""Prime, so that no block size divides it, and more than two blocks of 128."""
FLOAT32_TOLERANCE = 1e-5
STREAM_TOLERANCE = 2.0**-6
"""Two units in the last place of bfloat16; also for all that is computed from streams which were rounded on the way."""
ROTATION_BYTES = 256 * 2**20
"""Inputs rotate over at least this much: more than twice the largest second-level cache of an accelerator (B200: 126 MB)."""
BATCH_SECONDS = 0.02
"""A timed batch lasts about this long, so that the latency of a dispatch (tens of microseconds) does not count."""

Sets = Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]]
"""(arguments, cotangents of the outputs) of a number of calls."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What `alternating` times."""

    launch: Callable[[int], Any]
    """Start dispatch number k, which does `calls` calls; returns what `wait` waits for."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    calls: int = 1


@runtime_checkable
class Implementation(Protocol):
    """One contestant; peers in other frameworks have the same three methods."""

    @property
    def name(self) -> str:
        """As `--implementations` takes it."""
        ...

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Why it cannot run this call here; None: it can."""
        ...

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Outputs, and where `backward` gradients of the arguments, of the first set."""
        ...

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """A dispatch does `calls` calls, on sets which rotate."""
        ...


@dataclasses.dataclass(frozen=True)
class Ours:
    """A backend of mhc_kernels by the name that `implementation=` takes."""

    name: str

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Traces the call; what `mhc_kernels.choice.choose` raises is the answer."""
        try:
            jax.eval_shape(function(op, spec, self.name), *_shapes(op, spec))
        except ValueError as error:
            return str(error).partition("cannot run this: ")[2].partition(". Here")[0] or str(error)
        return None

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """See `Implementation`."""
        out = jax.jit(program(function(op, spec, self.name), backward))(*sets[0])
        return [np.asarray(a) for a in out]

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """The calls of a dispatch are one program, each held back until the one before it is done."""
        run = program(function(op, spec, self.name), backward)

        def several(group):
            out, done = [], ()
            for one in group:
                one, done = jax.lax.optimization_barrier((one, done))
                out.append(done)
                done = run(*one)
            return out, done

        compiled = jax.jit(several)
        groups = [tuple(sets[k : k + calls]) for k in range(0, len(sets), calls)]
        return Batch(lambda k: compiled(groups[k % len(groups)]), calls=calls)


def implementations(op: str) -> list[Implementation]:
    """`xla` and every backend that the operation has, whether or not it runs here."""
    return [Ours("xla"), *(Ours(name) for name in backends.BACKENDS[op])]


def _shapes(op: str, spec: ArgSpec) -> tuple[Any, ...]:
    return jax.eval_shape(lambda: arguments(op, spec, jax.random.key(0)))


def make_sets(op: str, spec: ArgSpec, count: int) -> Sets:
    """Random arguments and cotangents of `count` calls, no two alike."""
    shapes = jax.eval_shape(function(op, spec, "xla"), *_shapes(op, spec))

    @jax.jit
    def make(key):
        given, *rest = jax.random.split(key, 1 + len(shapes))
        normal = (jax.random.normal(k, s.shape, s.dtype) for k, s in zip(rest, shapes, strict=True))
        return arguments(op, spec, given), tuple(normal)

    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


# --------------------------------------------------------------------------------------------------------------- gate


@dataclasses.dataclass(frozen=True)
class Gate:
    """Largest |difference| of each result from float64, relative to its largest entry, and what is allowed."""

    errors: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    @property
    def worst(self) -> str:
        """Name of the result nearest to its bound, or furthest above it."""
        return max(
            self.errors, key=lambda name: math.inf if math.isnan(e := self.errors[name]) else e / self.allowed[name]
        )


def float64_results(op: str, spec: ArgSpec, given: Sequence[Any], cotangents: Sequence[Any]) -> list[np.ndarray]:
    """Outputs and then gradients of the arguments by the reference in float64, on the host's CPU.

    Raises:
      RuntimeError: JAX_PLATFORMS leaves the CPU out.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        sets = (tuple(jnp.asarray(np.asarray(a, np.float64)) for a in arrays) for arrays in (given, cotangents))
        return [np.asarray(a) for a in jax.jit(program(function(op, spec, "reference"), True))(*sets)]


def gate(op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0) -> Gate:
    """Outputs and gradients at a small token count against float64.

    Args:
      op: operation.
      spec: workload; its width, streams and dtype are kept.
      implementation: contestant.
      loosest: a bound to use where it is above ours, for contestants that compute in lower precision by design.
    """
    small = dataclasses.replace(spec, tokens=min(spec.tokens, GATE_TOKENS))
    sets = make_sets(op, small, 1)
    expected = float64_results(op, small, *sets[0])
    names = [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])]
    dtypes = [a.dtype for part in (sets[0][1], sets[0][0]) for a in part]
    errors = dict.fromkeys(names, 0.0)
    # The forward on its own may be another program than the one that saves for the backward.
    for backward in (False, True):
        actual = implementation.results(op, small, sets, backward)
        for name, a, b in zip(names[: len(actual)], actual, expected[: len(actual)], strict=True):
            if a.shape != b.shape:
                raise ValueError(f"{op}: {implementation.name} returns {name} of shape {a.shape}, not {b.shape}.")
            error = np.abs(np.asarray(a, np.float64) - b).max() / max(float(np.abs(b).max()), 1e-30)
            errors[name] = float(np.maximum(errors[name], error))  # NaN stays
    allowed = {}
    for name, dtype in zip(names, dtypes, strict=True):
        exact_inputs = dtype == jnp.float32 and (op != "write_read" or spec.dtype == "float32")
        allowed[name] = max(FLOAT32_TOLERANCE if exact_inputs else STREAM_TOLERANCE, loosest)
    return Gate(errors, allowed)


def attempt(
    op: str, spec: ArgSpec, implementation: Implementation, loosest: float = 0.0, known: Gate | None = None
) -> tuple[str, Gate | None]:
    """(`ok`, `FAILED`, or why there is no gate; the gate): arguments as those of `gate`, whose result may be `known`."""
    obstacle = implementation.obstacle(op, spec)
    if obstacle is not None:
        return obstacle, None
    try:
        result = known or gate(op, spec, implementation, loosest)
    except Exception as error:  # a kernel that fails to compile must not cost the rows of the others
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    return "ok" if result.passed else "FAILED", result


# ------------------------------------------------------------------------------------------------------------- timing


def alternating(batches: Mapping[str, Batch], rounds: int, seconds: float = BATCH_SECONDS) -> dict[str, list[float]]:
    """Seconds a call of each contestant, one value a round; every round runs all of them, in turning order.

    Each timed batch follows an untimed dispatch of the same contestant: the first after another's pays for the caches and
    pages which that one left behind (on CPU up to 4 ms, whoever comes second).
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
    """Bytes a second, read and written, of x + 1 over 1 GiB of float32 (a CPU: 256 MiB)."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = alternating({"copy": Batch(lambda k: copy(x))}, rounds)["copy"]
    return 2 * x.nbytes / statistics.median(times)


def rotation(set_bytes: int) -> tuple[int, int]:
    """(calls a dispatch, sets): a dispatch moves ROTATION_BYTES or makes 16 calls; all sets together fill ROTATION_BYTES.

    On a CPU, where a dispatch costs little beside a call, a dispatch is one call.  At most 512 sets: the `tiny` workloads
    stay in cache.
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
    """Rows of one operation on one workload: each contestant, forward, then forward + backward.

    Args:
      op: operation.
      spec: workload.
      contestants: `implementations(op)` and any peers.
      rounds: of the alternation.
      copy: bytes a second of `copy_bandwidth`, of the same run.
      loosest: contestants that compute in lower precision by design, and the error which they may have.
      known: gates of this workload that are done already.

    Yields:
      `op`, `pass`, `spec` (its fields), `implementation`, `status` `ok`, `ms`, `ms_rounds`, `bytes` (see `floor_bytes`),
      `copy_share` (bytes a second over `copy`), `errors` and `worst` (see `Gate`); then for each contestant that is not
      timed one row whose `status` says why: `FAILED` at the gate, an error, or what it does not support.
    """
    status: dict[str, str] = {}
    gates: dict[str, Gate] = {}
    for one in contestants:
        status[one.name], passed = attempt(op, spec, one, loosest.get(one.name, 0.0), known.get(one.name))
        if passed is not None:
            gates[one.name] = passed
    common = {"op": op, "spec": dataclasses.asdict(spec)}
    gate_of = {name: {"errors": dict(g.errors), "worst": g.worst} for name, g in gates.items()}
    able = [one for one in contestants if status[one.name] == "ok"]
    calls, count = rotation(sum(math.prod(a.shape) * a.dtype.itemsize for a in _shapes(op, spec)))
    sets = make_sets(op, spec, count) if able else []
    for backward in (False, True):
        moved = floor_bytes(op, spec, backward)
        times = alternating({one.name: one.batch(op, spec, sets, calls, backward) for one in able}, rounds)
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
    """Markdown, one line a row of `measure`."""
    lines = [
        "| op | pass | workload | implementation | ms | GB | of copy | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        error = f"{row['errors'][row['worst']]:.0e} ({row['worst']})" if "errors" in row else ""
        if row["status"] == "ok":
            figures = f"{row['ms']:.3f} | {row['bytes'] / 1e9:.3f} | {100 * row['copy_share']:.0f} %"
        else:
            figures = f"{row['status']} | | "
        spec = ArgSpec(**row["spec"])
        lines.append(f"| {row['op']} | {row['pass']} | {spec} | {row['implementation']} | {figures} | {error} |")
    return "\n".join(lines)
