"""The choice of a mesh for a slice, by compiling the train step of one connection on every mesh that may be fast."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from mhc_jax.config import ExperimentConfig, MeshConfig
from mhc_jax.errors import InputError, require
from mhc_jax.parallel.sharding import make_mesh
from mhc_jax.planning.compile_table import Row, line
from mhc_jax.planning.slices import Slice
from mhc_jax.remat_plan import state_bytes

CHOSEN = ("data", "fsdp", "expert")
"""The mesh axes whose sizes are chosen.  They split the batch.  The other axes keep the sizes of the configuration."""


def candidates(config: ExperimentConfig, where: Slice) -> list[MeshConfig]:
    """Return the meshes of all devices of a slice that the step may be compiled on.

    They divide the dimensions of the configuration, can be laid on the torus, and their parts of the parameters, gradients and
    moments alone fit into the memory of a device.  Experts are split only if model.experts sets a buffer, because without one every
    device computes as many rows as the worst case has.

    Raises:
      InputError: there is no such mesh, or the vocabulary is not known.
    """
    config.model.require_resolved()
    fixed = config.mesh.size // config.mesh.batch
    rest, remainder = divmod(len(where.devices), fixed)
    sizes = [n for n in range(1, rest + 1) if rest % n == 0 and remainder == 0]
    found = []
    for axes in itertools.product(sizes, repeat=len(CHOSEN)):
        mesh = dataclasses.replace(config.mesh, **dict(zip(CHOSEN, axes, strict=True)))
        if mesh.size != len(where.devices) or (mesh.expert > 1 and not config.model.expert_buffer):
            continue
        try:
            dataclasses.replace(config, mesh=mesh)
            make_mesh(mesh, where.devices)
        except (InputError, NotImplementedError):
            continue
        if state_bytes(config.model, mesh) < where.chip.hbm:
            found.append(mesh)
    require(
        len(found) > 0,
        f"No mesh along data, fsdp and expert suits {where.name}. A mesh must divide data.batch_size / "
        "optimizer.accumulation_steps, model.width and the number of experts. Its parameters and moments must fit into memory.",
    )
    return found


def best_mesh(
    config: ExperimentConfig,
    kinds: Sequence[str],
    where: Slice,
    compiled: Callable[[ExperimentConfig, Sequence[str]], list[Row]],
) -> tuple[MeshConfig, list[Row]]:
    """Return the mesh with the fastest step of the first connection among those on which every connection fits.

    Args:
      config: the configuration of the step.  Its mesh is replaced.
      kinds: connections, of which the first is compiled on every mesh.
      where: the slice.
      compiled: a function that compiles the step of a configuration with several connections and returns their rows, as
        `compile_table.estimates` does.

    Returns:
      the mesh, and the rows of the first connection on all meshes, the fastest first.  If all connections fit on no mesh, it is
      the mesh on which the first connection takes the least memory.
    """
    rows: list[tuple[MeshConfig, Row]] = []
    for mesh in candidates(config, where):
        [row] = compiled(dataclasses.replace(config, mesh=mesh), kinds[:1])
        rows.append((mesh, {**row, "mesh": str(mesh)}))
    rows.sort(key=lambda pair: (not pair[1]["fits"], pair[1].get("seconds", {"step": 0.0})["step"]))
    for mesh, row in rows:
        if row["fits"] and all(other["fits"] for other in compiled(dataclasses.replace(config, mesh=mesh), kinds[1:])):
            return mesh, [row for _, row in rows]
    least, _ = min(rows, key=lambda pair: pair[1]["needs"] or float("inf"))
    return least, [row for _, row in rows]


def markdown(rows: Sequence[Row], where: Slice) -> str:
    """Return a Markdown table of the rows of `best_mesh`: step, compute, collectives and memory of the step on each mesh."""
    kind = rows[0]["connection"]
    out = [f"Meshes of {where.name}, by the whole step with {kind}:", ""]
    out += ["| mesh | step (ms) | compute (ms) | collectives (ms) | HBM (GiB) | fits |", "| --- " * 6 + "|"]
    for row in rows:
        times: Any = row.get("seconds")
        cells = [f"{1e3 * times[key]:.1f}" for key in ("step", "compute", "collectives")] if times else [""] * 3
        needs = "?" if row["needs"] is None else f"{row['needs'] / 2**30:.2f}"
        out.append(line([row["mesh"], *cells, f"{needs} of {row['hbm'] / 2**30:.2f}", "yes" if row["fits"] else "no"]))
    return "\n".join(out)
