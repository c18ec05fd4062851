"""The groups of devices that a collective of a compiled program runs between, and the mesh axes that they span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

_AXES = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
"""A mesh axis in HLO's notation, such as `'a'`, or a part of an axis, such as `'a':(2)2`."""


def groups(line: str, devices: int) -> list[tuple[int, ...]]:
    """Read the device groups from the HLO line of a collective, in any of HLO's three notations.

    A list, `{{0,1},{2,3}}`, is empty for all devices.  An iota is reshaped, transposed and reshaped, as in `[4,2]<=[8]T(1,0)`.
    Axes of a mesh are named, as in `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`.  In the notation by axes, `'a':(2)2` is a
    part of axis a: of size 2, inside a part of size 2.
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
    """Return the array that a text such as `[2,4]T(1,0)` describes: numbers from 0 on in shape [2, 4], then transposed."""
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    ids = np.arange(math.prod(sizes := [int(d) for d in shape.split(",")])).reshape(sizes)
    return ids.transpose([int(d) for d in turned.split(",")]) if turned else ids


def axes_of(device_groups: list[tuple[int, ...]], mesh: Mapping[str, int], pairs: bool = False) -> str:
    """Name the fewest mesh axes that the groups span, as `data+fsdp`, or `other` if the groups span no product of axes.

    Args:
      device_groups: groups of devices, by their positions in the mesh.
      mesh: sizes of the mesh axes by name, in order.
      pairs: whether the groups are pairs of devices.  Pairs need not fill the axes: it is enough that each lies within them.
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
