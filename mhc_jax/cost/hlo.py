"""A parser of the HLO text of a compiled program, and counts of the program's cycles, FLOPs, bytes and collectives.

The compiler's own totals (`cost_analysis`) count the body of a loop once.  Here it counts as often as it runs, also in nested
loops.  Cycles are estimates that the TPU compiler writes into the text for each operation, except for Pallas kernels and
collectives.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mhc_jax.cost.device_groups import axes_of, groups

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
KERNEL = 'custom_call_target="tpu_custom_call"'
"""Text that the HLO line of every Pallas kernel contains."""
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("after-all", "partition-id", "replica-id", "iota", "async-update"),
    )
)
"""HLO operations that move no bytes themselves."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of an HLO computation, which is one line of the HLO text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    def called(self, attribute: str) -> str:
        """Return the name of the computation in an attribute (`calls`, `body`, `condition`), or '' without this attribute."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.line)
        return match[1] if match else ""

    def branches(self) -> list[str]:
        """Return the names of a `conditional`'s branches, in the order of its index, or (false, true) if a boolean chooses."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.line):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [name for name in map(self.called, ("false_computation", "true_computation")) if name]


class Program:
    """A compiled program, read from its text (`compiled.as_text()`) as a dict of computations, which are dicts of instructions."""

    def __init__(self, text: str):
        self.text = text
        self.shares: Mapping[str, Sequence[float]] = {}
        """For each conditional named here, how often each of its alternatives runs, per run of the conditional.

        All alternatives of other conditionals count as run once."""
        self.bodies: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = header[2]
                self.entry = current if header[1] else self.entry
                self.bodies[current] = {}
            elif current and (instruction := _instruction(line)):
                self.bodies[current][instruction.name] = instruction

    def part(self, entry: str = "", shares: Mapping[str, Sequence[float]] | None = None) -> Program:
        """Return a copy that starts at the computation `entry`, and whose conditionals take branches as often as `shares` says.

        Without an argument, the copy has the `entry` or the `shares` of this program.
        """
        part = copy.copy(self)
        part.entry = entry or self.entry
        part.shares = self.shares if shares is None else shares
        return part

    def walk(self, fused: bool = False) -> Iterator[tuple[Instruction, str, int | float]]:
        """Yield (instruction, name of its computation, how often it runs).  With `fused`, instructions inside fusions come too."""
        yield from self._walk(self.entry, 1, fused)

    def _walk(self, name: str, times: int | float, fused: bool) -> Iterator[tuple[Instruction, str, int | float]]:
        for instruction in self.bodies[name].values():
            yield instruction, name, times
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._walk(instruction.called("body"), times * self.turns(instruction), fused)
            elif opcode == "conditional":
                branches = instruction.branches()
                shares = self.shares.get(instruction.name, [1] * len(branches))
                for branch, share in zip(branches, shares, strict=True):
                    yield from self._walk(branch, times * share, fused)
            elif opcode == "call" or (fused and opcode in ("fusion", "async-start")):
                yield from self._walk(instruction.called("to_apply") or instruction.called("calls"), times, fused)

    def turns(self, loop: Instruction) -> int:
        """Return the number of iterations of a while loop.

        The compiler usually notes this number.  Without a note it is the only constant in the loop's condition, because the loop
        counts from 0 up to this constant.

        Raises:
          ValueError: the compiler noted no number, and the condition does not have exactly one constant.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        pending, bounds = [loop.called("condition")], set[str]()
        while pending:
            for instruction in self.bodies[pending.pop()].values():
                bounds.update(re.findall(r" s32\[\]\S* constant\((\d+)\)", instruction.line))
                pending += filter(None, [instruction.called("calls")])
        if len(bounds) != 1:
            raise ValueError(
                f"the turns of {loop.name} are not known: its condition has the constants {sorted(bounds)}"
            )
        return int(bounds.pop())


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, opening, rest = rest.partition("(")
    if not opening:
        return None
    inside = rest[: _closing("(" + rest) - 2]
    return Instruction(start[1], shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), line)


def _closing(text: str) -> int:
    """Return the position after the parenthesis that closes the one with which `text` begins."""
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return k + 1
    return len(text)


def dimensions(shape: str) -> tuple[int, ...]:
    """Return the dimensions of the first array in an HLO shape, such as (6, 1024) of `bf16[6,1024]{1,0:T(8,128)}`."""
    match = re.search(r"\[([\d,]*)\]", shape)
    return _numbers(match[1]) if match else ()


def arrays(shape: str) -> list[int]:
    """Return the size in bytes, without padding, of every array in an HLO shape.  The arrays of nested tuples form one list."""
    out = []
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        width = re.match(r"[a-z]+(\d+)", kind)
        bits = 8 if kind == "pred" else int(width[1]) if width else 0
        out.append(math.prod(_numbers(sizes)) * bits // 8)
    return out


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(d) for d in listed.split(",") if d)


def fusions(text: str) -> int:
    """Count the fusions in the text of a compiled program.  A fusion in a loop counts once."""
    return text.count(" fusion(")


# -- cycles


def cycles(program: Program, kernel: Callable[[Instruction], float]) -> float:
    """Return the estimated number of cycles of one run of a program, without its collectives.

    Args:
      program: the program, compiled for a TPU.
      kernel: a function that returns the cycles of a Pallas kernel, for which the compiler has no estimate.
    """
    total = 0.0
    for instruction, _, times in program.walk():
        # Where it has no estimate the compiler writes -1 as an unsigned number, which has more than 15 digits.
        if estimate := re.search(r'"estimated_cycles":"(\d{1,15})"', instruction.line):
            total += times * int(estimate[1])
        elif KERNEL in instruction.line:
            total += times * kernel(instruction)
    return total


def kernel_estimate(kernel: Instruction) -> tuple[float, float] | None:
    """Return (FLOPs, bytes) that the author of a Pallas kernel estimated (`pl.CostEstimate`), or None without an estimate."""
    moved = re.search(r'"bytes_accessed":"?(\d+)', kernel.line)
    work = re.search(r'"flops":"?(\d+)', kernel.line)
    return (float(work[1]) if work else 0.0, float(moved[1])) if moved else None


# -- FLOPs and bytes


def flops(program: Program, kernel: Callable[[Instruction], float]) -> float:
    """Return the FLOPs of one run of a program: 2 for each multiplication of a matrix product, and the FLOPs of Pallas kernels.

    Matrix products are `dot` and `convolution` instructions.  The TPU compiler turns every `dot` into a `convolution`.

    Args:
      program: the program, compiled for any backend.
      kernel: a function that returns the FLOPs of a Pallas kernel.
    """
    total = 0.0
    for instruction, computation, times in program.walk(fused=True):
        if KERNEL in instruction.line:
            total += times * kernel(instruction)
        elif instruction.opcode in ("dot", "convolution"):
            body = program.bodies[computation]
            left, right = (dimensions(body[name].shape) for name in instruction.operands)
            product = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            total += times * product(instruction, left, right)
    return total


def _dot_flops(dot: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.line)
    depth = math.prod(left[d] for d in _numbers(contracted[1])) if contracted else 1
    return 2.0 * depth * math.prod(dimensions(dot.shape))


def _convolution_flops(convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Count 2 FLOPs for each product of two elements, without products with padding.

    In a batched matrix product that is written as a convolution, most products are products with padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.line)
    assert labels, convolution.line
    lhs, rhs, out = labels.groups()
    spatial = sorted(set(rhs) - set("io"))
    window = re.search(r"window=\{([^}]*)\}", convolution.line)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(name: str, k: int, default: str) -> str:
        return fields[name].split("x")[k] if name in fields else default

    pairs, result = 1, dimensions(convolution.shape)
    for k, d in enumerate(spatial):
        size, turns, n = right[rhs.index(d)], result[out.index(d)], left[lhs.index(d)]
        low = int(field("pad", k, "0_0").split("_")[0])
        stride, dilate, spread = (int(field(name, k, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        at = np.arange(turns)[:, None] * stride + np.arange(size)[None] * dilate - low
        pairs *= int(((at >= 0) & (at < (n - 1) * spread + 1) & (at % spread == 0)).sum())
    batch_groups = re.search(r"batch_group_count=(\d+)", convolution.line)
    features = math.prod(result[out.index(d)] for d in "bf")
    return 2.0 * pairs * features * right[rhs.index("i")] / (int(batch_groups[1]) if batch_groups else 1)


def bytes_accessed(program: Program) -> float:
    """Return the bytes that one run reads from and writes to HBM: the operands and results of every operation.

    A fusion is one operation.  If it reads or writes only a slice of an operand, the slice alone counts.  An operand that several
    operations read counts once for each of them.  Arrays in VMEM do not count.
    """
    total = 0.0
    for instruction, computation, times in program.walk():
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        body = program.bodies[computation]
        sizes = [_hbm_bytes(body[name].shape) if name in body else 0 for name in instruction.operands]
        result = _hbm_bytes(instruction.shape)
        if instruction.opcode == "fusion":
            sizes, result = _sliced(program.bodies[instruction.called("calls")], sizes, result)
        elif instruction.opcode == "dynamic-slice":
            sizes = [result]
        elif instruction.opcode == "dynamic-update-slice":
            sizes, result = [0], 2 * sizes[1]
        total += times * (sum(sizes) + result)
    return total


def _hbm_bytes(shape: str) -> int:
    """Return the number of bytes of those arrays in an HLO shape that are in HBM (memory space 0)."""
    parts = re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)
    return sum(sum(arrays(part)) for part in parts if not re.search(r"S\([1-9]\)", part))


def _sliced(fused: dict[str, Instruction], sizes: list[int], result: int) -> tuple[list[int], int]:
    """Return (bytes of each operand of a fusion, bytes of its result).  If only slices of an operand are used, they alone count."""
    sizes = list(sizes)
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        number = int(re.search(r"parameter\((\d+)\)", parameter.line)[1])  # pyright: ignore[reportOptionalSubscript]
        users = [user for user in fused.values() if parameter.name in user.operands]
        if users and all(u.opcode == "dynamic-slice" and u.operands[0] == parameter.name for u in users):
            sizes[number] = min(sizes[number], sum(sum(arrays(u.shape)) for u in users))
        elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
            written = sum(sum(arrays(fused[u.operands[1]].shape)) for u in users)
            result = max(0, result - sizes[number]) + written
            sizes[number] = 0
    return sizes, result


# -- collectives


@dataclass(frozen=True)
class Collective:
    """All collectives of a program that have the same kind, size in bytes and devices."""

    kind: str
    axes: str
    """Mesh axes along which the collective runs, as in `data+fsdp`, or `other` if no mesh axes give its groups of devices."""
    group: tuple[int, ...]
    """Devices of one of the groups within which the collective runs, as their positions in the mesh."""
    count: int
    """Number of times that these collectives run in one run of the program, each iteration of a loop included."""
    bytes: int
    """Size in bytes, on one device, of the operand if the collective is a reduce-scatter, and of the result otherwise."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends if the collective runs once on a ring.  In an all-to-all it sends all but its own part."""
        g = len(self.group)
        shares = {"all-reduce": 2 * (g - 1) / g, "collective-permute": 1.0}
        return self.bytes * shares.get(self.kind, (g - 1) / g)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Return the collectives between devices, sorted by their total bytes (count x bytes), the largest first.

    Args:
      program: the program, compiled for all devices of the mesh.
      mesh: sizes of the mesh axes by name, in order.
    """
    counts: dict[Collective, float] = {}
    seen: set[tuple[str, str]] = set()
    fused = {one.called("calls") for body in program.bodies.values() for one in body.values()}
    for instruction, computation, times in program.walk(fused=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        # One asynchronous collective may appear in three fusions (start, steps, end) with the same channel id.  It counts once.
        channel = re.search(r"channel_id=(\d+)", instruction.line)
        if channel and computation in fused:
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        device_groups = groups(instruction.line, math.prod(mesh.values()))
        if max(map(len, device_groups)) < 2:
            continue
        # The result of an asynchronous start is a tuple of the operand and the result, of which only the larger counts.
        size = (max if instruction.opcode.endswith("-start") else sum)(arrays(instruction.shape))
        if kind == "reduce-scatter":
            size *= len(device_groups[0])
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        axes = axes_of(device_groups, mesh, pairs=kind == "collective-permute")
        entry = Collective(kind, axes, device_groups[0], 0, size)
        counts[entry] = counts.get(entry, 0) + times
    rows = [dataclasses.replace(entry, count=round(count)) for entry, count in counts.items()]
    return sorted(rows, key=lambda row: -row.count * row.bytes)
