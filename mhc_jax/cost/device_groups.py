"""The devices that a collective of a compiled program runs between, and the axes of the mesh that are those."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np


def groups(line: str, devices: int) -> list[tuple[int, ...]]:
    """Device groups of a collective, in any of HLO's notations.

    `{{0,1},{2,3}}`, empty for all; `[4,2]<=[8]T(1,0)` (iota, reshaped, transposed, reshaped); and by axes of a mesh,
    `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`, where `'a':(2)2` is the part of axis a of size 2 behind one of size 2.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _listed(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return [tuple(map(int, row)) for row in _iota(iota[2]).reshape([int(d) for d in iota[1].split(",")])]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXES.findall(mesh[3])}
        shape, inside = [], []
        for name, size in sizes.items():
            before, own = parts.get(name, (size, 1))
            inside.append(len(shape) + 1)
            shape += [before, own, size // before // own]
        grouped = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
        return [tuple(map(int, row)) for row in grouped.reshape(-1, math.prod(own for _, own in parts.values()))]
    return [tuple(range(devices))]


_AXES = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _listed(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(d) for d in row.split(",") if d) for row in re.findall(r"\{([\d, ]*)\}", text)]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers from 0 on in that shape, transposed."""
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    ids = np.arange(math.prod(sizes := [int(d) for d in shape.split(",")])).reshape(sizes)
    return ids.transpose([int(d) for d in turned.split(",")]) if turned else ids


def axes_of(found: list[tuple[int, ...]], mesh: Mapping[str, int], pairs: bool = False) -> str:
    """The mesh axes that the groups run over: fewest first; with `pairs`, those within which every pair lies."""
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    wanted = {frozenset(group) for group in found}
    names = [name for name, size in mesh.items() if size > 1]
    for number in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, number):
            inside = [list(mesh).index(name) for name in chosen]
            rows = np.moveaxis(ids, inside, range(-number, 0)).reshape(-1, math.prod(mesh[name] for name in chosen))
            partition = {frozenset(map(int, row)) for row in rows}
            if partition == wanted or (pairs and all(any(pair <= row for row in partition) for pair in wanted)):
                return "+".join(chosen)
    return "other"
