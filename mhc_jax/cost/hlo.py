"""What a compiled program says of itself: estimated cycles, collectives, FLOPs, bytes, memory per device; from its HLO text.

The compiler's own totals (`cost_analysis`) count the body of a loop once; here a loop counts by its turns, nested loops by the
product.  Cycles are the TPU compiler's estimates of single operations, which stand in the text; it has none for Pallas kernels
and none for collectives.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_jax.cost.device_groups import axes_of, groups

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
KERNEL = 'custom_call_target="tpu_custom_call"'
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4}
"""Of types whose name does not end in their width."""
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("after-all", "partition-id", "replica-id", "iota", "async-update"),
    )
)
"""What moves nothing by itself."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    def called(self, attribute: str) -> str:
        """Name of a computation it runs: `calls`, `body`, `condition`; empty: none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.line)
        return found[1] if found else ""

    def branches(self) -> list[str]:
        """Computations that a conditional chooses from, by index; of one that asks a truth value, that of false first."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.line):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [name for name in map(self.called, ("false_computation", "true_computation")) if name]


class Program:
    """The text of a compiled program (`compiled.as_text()`), taken apart."""

    def __init__(self, text: str):
        self.text = text
        self.shares: Mapping[str, Sequence[float]] = {}
        """How often each branch of a conditional runs, by its name; of others every branch counts once."""
        self.bodies: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = header[2]
                self.entry = current if header[1] else self.entry
                self.bodies[current] = {}
            elif current and (one := _instruction(line)):
                self.bodies[current][one.name] = one

    def part(self, entry: str = "", shares: Mapping[str, Sequence[float]] | None = None) -> Program:
        """The same, from another computation on, or with branches that run as often as `shares` says."""
        other = copy.copy(self)
        other.entry = entry or self.entry
        other.shares = self.shares if shares is None else shares
        return other

    def walk(self, fused: bool = False) -> Iterator[tuple[Instruction, str, int | float]]:
        """(instruction, its computation, times it runs), loops by their turns; with `fused`, into fusions too."""
        yield from self._walk(self.entry, 1, fused)

    def _walk(self, name: str, times: int | float, fused: bool) -> Iterator[tuple[Instruction, str, int | float]]:
        for one in self.bodies[name].values():
            yield one, name, times
            if one.opcode == "while":
                yield from self._walk(one.called("body"), times * self.turns(one), fused)
            elif one.opcode == "conditional":
                branches = one.branches()
                for branch, share in zip(branches, self.shares.get(one.name, [1] * len(branches)), strict=True):
                    yield from self._walk(branch, times * share, fused)
            elif one.opcode == "call" or (fused and one.opcode in ("fusion", "async-start")):
                yield from self._walk(one.called("to_apply") or one.called("calls"), times, fused)

    def turns(self, loop: Instruction) -> int:
        """Of a while: what the compiler noted, else the one constant its condition counts to from 0.

        Raises:
          ValueError: neither is there.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        pending, bounds = [loop.called("condition")], set[str]()
        while pending:
            for one in self.bodies[pending.pop()].values():
                bounds.update(re.findall(r" s32\[\]\S* constant\((\d+)\)", one.line))
                pending += filter(None, [one.called("calls")])
        if len(bounds) != 1:
            raise ValueError(
                f"the turns of {loop.name} are not known: its condition has the constants {sorted(bounds)}"
            )
        return int(bounds.pop())


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, opening, rest = rest.partition("(")
    if not opening:
        return None
    inside = rest[: _closing("(" + rest) - 2]
    return Instruction(found[1], shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), line)


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` has closed."""
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return k + 1
    return len(text)


def dimensions(shape: str) -> tuple[int, ...]:
    """Of the first array in `bf16[6,1024]{1,0:T(8,128)}`."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return tuple(int(d) for d in found[1].split(",") if d) if found else ()


def arrays(shape: str) -> list[int]:
    """Bytes of every array of a shape, tuples flattened; without padding."""
    out = []
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        width = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS[kind] if kind in _BITS else int(width[1]) if width else 0
        out.append(math.prod(int(d) for d in sizes.split(",") if d) * bits // 8)
    return out


# -- cycles


def cycles(program: Program, kernel: Callable[[Instruction], float]) -> float:
    """Estimated cycles of one run, collectives left out.

    Args:
      program: of a TPU.
      kernel: cycles of a Pallas kernel, for which the compiler has no estimate.
    """
    total = 0.0
    for one, _, times in program.walk():
        if estimate := re.search(r'"estimated_cycles":"(\d{1,15})"', one.line):  # more digits are a -1: there is none
            total += times * int(estimate[1])
        elif KERNEL in one.line:
            total += times * kernel(one)
    return total


def kernel_estimate(one: Instruction) -> tuple[float, float] | None:
    """(FLOPs, bytes) that a Pallas kernel's author wrote down (`pl.CostEstimate`); None: nothing."""
    moved = re.search(r'"bytes_accessed":"?(\d+)', one.line)
    flops = re.search(r'"flops":"?(\d+)', one.line)
    return (float(flops[1]) if flops else 0.0, float(moved[1])) if moved else None


# -- FLOPs and bytes


def flops(program: Program, kernel: Callable[[Instruction], float]) -> float:
    """2 x multiplications of all products (`dot`, and `convolution`, which the TPU compiler makes of them), and those of kernels.

    Args:
      program: any backend.
      kernel: FLOPs of a Pallas kernel.
    """
    total = 0.0
    for one, computation, times in program.walk(fused=True):
        if KERNEL in one.line:
            total += times * kernel(one)
        elif one.opcode in ("dot", "convolution"):
            body = program.bodies[computation]
            left, right = (dimensions(body[name].shape) for name in one.operands)
            total += times * (_dot if one.opcode == "dot" else _convolution)(one, left, right)
    return total


def _dot(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.line)
    depth = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * depth * math.prod(dimensions(one.shape))


def _convolution(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Products of elements that both exist: a batched product is a convolution of which most pairs fall outside."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line)
    assert labels, one.line
    lhs, rhs, out = labels.groups()
    spatial = sorted(set(rhs) - set("io"))
    window = re.search(r"window=\{([^}]*)\}", one.line)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(name: str, k: int, default: str) -> str:
        return fields[name].split("x")[k] if name in fields else default

    pairs, result = 1, dimensions(one.shape)
    for k, d in enumerate(spatial):
        size, turns, n = right[rhs.index(d)], result[out.index(d)], left[lhs.index(d)]
        low = int(field("pad", k, "0_0").split("_")[0])
        stride, dilate, spread = (int(field(name, k, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        at = np.arange(turns)[:, None] * stride + np.arange(size)[None] * dilate - low
        pairs *= int(((at >= 0) & (at < (n - 1) * spread + 1) & (at % spread == 0)).sum())
    groups = re.search(r"batch_group_count=(\d+)", one.line)
    features = math.prod(result[out.index(d)] for d in "bf")
    return 2.0 * pairs * features * right[rhs.index("i")] / (int(groups[1]) if groups else 1)


def bytes_accessed(program: Program) -> float:
    """HBM bytes read and written: operands and results of every operation outside fusions that are not in VMEM.

    What a fusion takes a slice of, or writes a slice into, counts as the slice.  An operand that several operations read counts
    for each.
    """
    total = 0.0
    for one, computation, times in program.walk():
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            continue
        body = program.bodies[computation]
        sizes = [_hbm(body[name].shape) if name in body else 0 for name in one.operands]
        result = _hbm(one.shape)
        if one.opcode == "fusion":
            sizes, result = _sliced(program.bodies[one.called("calls")], sizes, result)
        elif one.opcode == "dynamic-slice":
            sizes = [result]
        elif one.opcode == "dynamic-update-slice":
            sizes, result = [0], 2 * sizes[1]
        total += times * (sum(sizes) + result)
    return total


def _hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that live in HBM (memory space 0)."""
    parts = re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)
    return sum(sum(arrays(part)) for part in parts if not re.search(r"S\([1-9]\)", part))


def _sliced(fused: dict[str, Instruction], sizes: list[int], result: int) -> tuple[list[int], int]:
    """Bytes of a fusion's operands and result, where it slices them."""
    sizes = list(sizes)
    for one in fused.values():
        if one.opcode != "parameter":
            continue
        number = int(re.search(r"parameter\((\d+)\)", one.line)[1])  # pyright: ignore[reportOptionalSubscript]
        users = [u for u in fused.values() if one.name in u.operands]
        if users and all(u.opcode == "dynamic-slice" and u.operands[0] == one.name for u in users):
            sizes[number] = min(sizes[number], sum(sum(arrays(u.shape)) for u in users))
        elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == one.name for u in users):
            written = sum(sum(arrays(fused[u.operands[1]].shape)) for u in users)
            result = max(0, result - sizes[number]) + written
            sizes[number] = 0
    return sizes, result


# -- collectives


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, size and set of devices."""

    kind: str
    axes: str
    """Mesh axes it runs over, as `data+fsdp`; `other` where groups are no product of axes."""
    group: tuple[int, ...]
    """Positions in the mesh of the devices of one group."""
    count: int
    """Times it runs, loops by their turns."""
    bytes: int
    """Of the whole array on one device: what is gathered, reduced, scattered or exchanged."""

    @property
    def wire_bytes(self) -> float:
        """What a device sends in one run on a ring; for all-to-all, what it keeps not."""
        g = len(self.group)
        shares = {"all-reduce": 2 * (g - 1) / g, "collective-permute": 1.0}
        return self.bytes * shares.get(self.kind, (g - 1) / g)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives between devices; largest total first.

    Args:
      program: of all devices of the mesh.
      mesh: sizes of its axes, in order.
    """
    counts: dict[Collective, float] = {}
    seen: set[tuple[str, ...]] = set()
    fusions = {one.called("calls") for body in program.bodies.values() for one in body.values()}
    for one, computation, times in program.walk(fused=True):
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # An asynchronous collective may stand in the fusions of its start, its steps and its end, on one channel.
        channel = re.search(r"channel_id=(\d+)", one.line)
        if channel and computation in fusions:
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        found = groups(one.line, math.prod(mesh.values()))
        if max(map(len, found)) < 2:
            continue
        # The result of a start holds its operand too.
        size = max(arrays(one.shape)) if one.opcode.endswith("-start") else sum(arrays(one.shape))
        if kind == "reduce-scatter":
            size *= len(found[0])
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        entry = Collective(kind, axes_of(found, mesh, kind == "collective-permute"), found[0], 0, size)
        counts[entry] = counts.get(entry, 0) + times
    rows = [dataclasses.replace(entry, count=round(count)) for entry, count in counts.items()]
    return sorted(rows, key=lambda row: -row.count * row.bytes)


# -- memory


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device: arguments, outputs, temporaries, aliased (outputs that reuse arguments), total."""
    analysis = compiled.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
    }
    return {**sizes, "total": sum(sizes.values()) - 2 * sizes["aliased"]}


def fusions(program: Program) -> int:
    """Fusions in the text, a loop's once."""
    return program.text.count(" fusion(")
