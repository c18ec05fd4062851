"""Correctness gate and timing of the operations, for `kernels/bench.py` and `experiments/device_report.py`.

Only an implementation that has passed its gate is timed.  Implementations alternate (ABBA), each timed batch follows an untimed
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
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec, arguments, floor_bytes, function, program, shapes

GATE_TOKENS = 269
"""Tokens at the gate: a prime, so that no block size divides it, and more than two blocks of 128."""
FLOAT32_TOLERANCE = 1e-5
STREAM_TOLERANCE = 2.0**-6
"""Two units in the last place of bfloat16; it holds for all that is computed from streams that were rounded on the way."""
ROTATION_BYTES = 256 * 2**20
"""Inputs rotate over at least this much: more than twice the largest second-level cache of an accelerator (B200: 126 MB)."""
BATCH_SECONDS = 0.02
"""Approximate length of a timed batch, so that the latency of a dispatch (tens of microseconds) does not count."""

Sets = Sequence[tuple[tuple[Any, ...], tuple[Any, ...]]]
"""Pairs (arguments, cotangents of the outputs), one a call."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Calls that `alternating` times."""

    launch: Callable[[int], Any]
    """Starts dispatch number k, which does `calls` calls, and returns what `wait` waits for."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    calls: int = 1


@runtime_checkable
class Implementation(Protocol):
    """Contestant of a benchmark; peers in other frameworks have the same three methods."""

    @property
    def name(self) -> str:
        """Name, as `--implementations` takes it."""
        ...

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Say why it cannot run this call here; None: it can."""
        ...

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Compute the outputs, and where `backward` the gradients of the arguments, of the first set."""
        ...

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch whose dispatches do `calls` calls each, on sets that rotate."""
        ...


@dataclasses.dataclass(frozen=True)
class Ours:
    """Backend of mhc_kernels, by the name that `implementation=` takes."""

    name: str

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Trace the call; the answer is the message that `mhc_kernels.choice.choose` raises."""
        try:
            jax.eval_shape(function(op, spec, self.name), *shapes(op, spec)[0])
        except ValueError as error:
            return str(error).partition("cannot run this: ")[2].partition(". Here")[0] or str(error)
        return None

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """See `Implementation`."""
        out = jax.jit(program(function(op, spec, self.name), backward))(*sets[0])
        return [np.asarray(a) for a in out]

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """See `Implementation`: the calls of a dispatch are one program, each held back until the one before it is done."""
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
    """List `xla` and every kernel that the operation has, whether or not it runs here."""
    return [Ours("xla"), *(Ours(name) for name in backends.BACKENDS[op])]


def make_sets(op: str, spec: ArgSpec, count: int) -> Sets:
    """Draw random arguments and cotangents of `count` calls, no two alike."""
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
    """Largest |difference| of each result from float64, relative to its largest entry, and its bound."""

    errors: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound; NaN is not."""
        return all(self.errors[name] <= self.allowed[name] for name in self.errors)

    @property
    def worst(self) -> str:
        """Name of the result that is nearest to its bound, or furthest above it."""
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
    """Compare outputs and gradients at a small token count with float64.

    Args:
      op: operation.
      spec: workload; its tokens are cut to `GATE_TOKENS`.
      implementation: contestant.
      loosest: a bound that is used where it is above ours, for contestants that compute in lower precision by design.
    """
    small = dataclasses.replace(spec, tokens=min(spec.tokens, GATE_TOKENS))
    sets = make_sets(op, small, 1)
    expected = float64_results(op, small, *sets[0])
    names = [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])]
    dtypes = [a.dtype for part in (sets[0][1], sets[0][0]) for a in part]
    errors = dict.fromkeys(names, 0.0)
    # Without a gradient the forward pass may be another program than the one that saves for the backward pass.
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
    """Return a status (`ok`, `FAILED`, or why there is no gate) and the gate.

    Arguments are those of `gate`; `known` is its result where it is done already.
    """
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
    """Time the contestants: seconds a call, one value a round; every round runs all of them, in alternating order.

    Each timed batch follows an untimed dispatch of the same contestant, because the first one pays for the caches and pages that
    another contestant left behind.
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
    """Measure the bytes a second, read and written, of x + 1 over 1 GiB of float32 (on a CPU 256 MiB)."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = alternating({"copy": Batch(lambda k: copy(x))}, rounds)["copy"]
    return 2 * x.nbytes / statistics.median(times)


def rotation(set_bytes: int) -> tuple[int, int]:
    """Return (calls a dispatch, sets).

    A dispatch moves ROTATION_BYTES or makes 16 calls, and all sets together fill ROTATION_BYTES.  On a CPU, where a dispatch costs
    little beside a call, a dispatch is one call.  There are at most 512 sets, so the `tiny` workloads stay in cache.
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
    """Measure one operation on one workload: a row for each contestant, forward, then forward + backward.

    Args:
      op: operation.
      spec: workload.
      contestants: `implementations(op)` and any peers.
      rounds: number of rounds.
      copy: bytes a second of `copy_bandwidth` in the same run.
      loosest: contestants that compute in lower precision by design, and the error that they may have.
      known: gates of this workload that are done already.

    Yields:
      `op`, `pass`, `spec` (its fields), `implementation`, `status` `ok`, `ms`, `ms_rounds`, `bytes` (see `floor_bytes`),
      `copy_share` (bytes a second over `copy`), `errors` and `worst` (see `Gate`); then for each contestant that is not
      timed one row whose `status` says why: `FAILED` at the gate, an error, or what it does not support.
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
    """Format a Markdown table; `header` has the names of its columns between bars."""
    columns = header.count("|") + 1
    return "\n".join(
        [f"| {header} |", "| --- " * columns + "|", *("| " + " | ".join(map(str, c)) + " |" for c in lines)]
    )
