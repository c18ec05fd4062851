"""Find the groups of devices within which a collective of a compiled program runs, and the mesh axes that these groups span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

_AXES = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
"""Regular expression of a mesh axis as HLO writes it, such as `'a'`, or of a part of an axis, such as `'a':(2)2` (see `groups`)."""


def groups(line: str, devices: int) -> list[tuple[int, ...]]:
    """Return the device groups that the HLO line of a collective names, in any of HLO's three notations.

    - A list, such as `{{0,1},{2,3}}`.  An empty list stands for one group of all devices.
    - An iota, such as `[4,2]<=[2,4]T(1,0)`: the numbers from 0 on, as an array [2, 4], transposed, and then cut into 4 groups of 2.
    - Axes of a mesh, such as `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`.  `'a':(2)2` names a part of axis a only: if a is
      split into axes of sizes 2, 2 and the rest, it is the second of them.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _listed(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return [tuple(map(int, row)) for row in _iota(iota[2]).reshape([int(d) for d in iota[1].split(",")])]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", line):
        return _by_axes(*mesh.groups())
    return [tuple(range(devices))]


def _by_axes(mesh: str, order: str | None, axes: str) -> list[tuple[int, ...]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _iota(order) if order else np.arange(math.prod(sizes.values()))
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXES.findall(axes)}
    shape, inside = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        inside.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    grouped = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
    return [tuple(map(int, row)) for row in grouped.reshape(-1, math.prod(part for _, part in parts.values()))]


def _listed(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(d) for d in row.split(",") if d) for row in re.findall(r"\{([\d, ]*)\}", text)]


def _iota(text: str) -> np.ndarray:
    """Return the array that a text such as `[2,4]T(1,0)` describes: the numbers from 0 on in the shape [2, 4], transposed."""
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    ids = np.arange(math.prod(sizes := [int(d) for d in shape.split(",")])).reshape(sizes)
    return ids.transpose([int(d) for d in turned.split(",")]) if turned else ids


def axes_of(device_groups: list[tuple[int, ...]], mesh: Mapping[str, int], pairs: bool = False) -> str:
    """Return the names of the fewest mesh axes that the groups span, as in `data+fsdp`, or `other` if no axes give these groups.

    Args:
      device_groups: groups of devices, by their positions in the mesh.
      mesh: sizes of the mesh axes by name, in order.
      pairs: whether the groups are pairs (sender, receiver).  A pair need not be a whole group of the axes.  It is enough that it
        lies within one.
    """
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    wanted = {frozenset(group) for group in device_groups}
    names = [name for name, size in mesh.items() if size > 1]
    for number in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, number):
            inside = [list(mesh).index(name) for name in chosen]
            rows = np.moveaxis(ids, inside, range(-number, 0)).reshape(-1, math.prod(mesh[name] for name in chosen))
            partition = {frozenset(map(int, row)) for row in rows}
            if partition == wanted or (pairs and all(any(pair <= row for row in partition) for pair in wanted)):
                return "+".join(chosen)
    return "other"
