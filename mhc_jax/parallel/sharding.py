"""Meshes of devices, and the mesh axes that each logical axis of an array is split over.

Arrays name their axes logically (`constrain(q, "batch", "sequence", "heads", None)`), `RULES` says which mesh axes those are, and
XLA's partitioner (GSPMD) does the rest.  The mesh is the one of `jax.set_mesh`; without it everything here does nothing, and the
program is the one of a single device.

    stage      blocks: each device computes those of its stages (`mhc_jax/pipeline`)
    data       copies of the model, each with a part of the batch
    fsdp       as data, and parameters are split over it too: gathered layer by layer where they are used
    tensor     heads, hidden channels of the feed-forward and the vocabulary (Megatron, arXiv 1909.08053)
    expert     as data, and the experts of DeepSeekMoE are split over it
    sequence   tokens of a sequence; keys and values are gathered

Streams [B, T, nC] are split over batch and sequence and never over the stream axis; the parameters of connections are whole on
every device.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mhc_jax.config import AXES, MeshConfig
from mhc_jax.connections.parameter_paths import CONNECTION, path_of
from mhc_jax.errors import require


@dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    sequence: tuple[str, ...] = ("sequence",)
    heads: tuple[str, ...] = ("tensor",)
    """Heads, and the columns of all heads of a projection."""
    hidden: tuple[str, ...] = ("tensor",)
    """Hidden channels of the feed-forward."""
    vocabulary: tuple[str, ...] = ("tensor",)
    rows: tuple[str, ...] = ("stage", "tensor")
    """The vocabulary axis of the embeddings between two steps; a step gathers them over `stage`."""
    embed: tuple[str, ...] = ("fsdp",)
    """C of a weight; of an activation it is not split (None)."""
    expert: tuple[str, ...] = ("expert",)
    layer: tuple[str, ...] = ("stage",)
    """The leading axis of scanned parameters; whole where its blocks do not divide."""
    connection: tuple[str, ...] = ()
    """Every axis of a connection's parameters."""

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The mesh axes of an array; None is an axis that is not split.

        Raises:
          ValueError: two axes of the array would be split over one axis of the mesh.
        """
        axes = [() if name is None else getattr(self, name) for name in logical]
        used = [axis for group in axes for axis in group]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise ValueError(f"{logical} would use the mesh axis {', '.join(twice)} more than once; change `Rules`.")
        return PartitionSpec(*(group or None for group in axes))


RULES = Rules()

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)embedding$", ("rows", "embed")),
    (r"(^|/)unembedding$", ("embed", "rows")),
    (r"norm/weight$", (None,)),
    (r"attention/W_[qkv]$", ("embed", "heads")),
    (r"attention/W_o$", ("heads", "embed")),
    (r"attention/W_kv_down$", ("embed", None)),
    (r"attention/W_kv_up$", (None, "heads")),
    (r"mlp/W_(gate|up)$", ("embed", "hidden")),
    (r"mlp/W_down$", ("hidden", "embed")),
    (r"mlp/W_(gate|up)$", ("expert", "embed", "hidden")),
    (r"mlp/W_down$", ("expert", "hidden", "embed")),
    (r"mlp/W_shared_(gate|up)$", ("embed", "hidden")),
    (r"mlp/W_shared_down$", ("hidden", "embed")),
    (r"mlp/W_router$", ("embed", None)),
    (r"mlp/router_bias$", (None,)),
)
"""Logical axes of the parameters by path and number of axes, without the layer axis of scanned blocks."""
SCANNED = r"(^|/)(dense_)?layers/"


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of a parameter, or of a moment of it, by its path.

    Raises:
      ValueError: `PARAMETERS` does not know it.
    """
    if ndim == 0:  # counters, and the scalars of connections
        return ()
    if re.search(CONNECTION, path):
        return ("connection",) * ndim
    layer: tuple[str | None, ...] = ("layer",) if re.search(SCANNED, path) else ()
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path) and len(layer + axes) == ndim:
            return layer + axes
    raise ValueError(f"The parameter {path} with {ndim} axes has no logical axes; add a line to sharding.PARAMETERS.")


# ---------------------------------------------------------------------------------------------------------------- mesh


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of the first `config.size` devices, all axes there; None where all are 1.

    Raises:
      InputError: there are fewer devices, or of several processes some would be left out.
    """
    given, devices = devices, jax.devices() if devices is None else devices
    require(
        config.size <= len(devices),
        f"The mesh ({config}) asks for {config.size} devices, and there are {len(devices)}; make it smaller.",
    )
    require(
        given is not None or jax.process_count() == 1 or config.size == len(devices),
        f"The mesh ({config}) does not cover the {len(devices)} devices of the {jax.process_count()} processes; choose mesh.data, "
        f"fsdp, tensor, expert and sequence whose product is {len(devices)}.",
    )
    if config.size == 1:
        return None
    sizes = tuple(getattr(config, axis) for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: config.size])


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The same mesh of no devices, all axes there: for shapes of parts."""
    return AbstractMesh(tuple(getattr(config, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Trace, compile and run inside: arrays are split over this mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def current() -> AbstractMesh | None:
    """The mesh that is traced for, or None: there is none, or the code runs on one device's part already (`jax.shard_map`).

    Within a stage of a pipeline the other axes are still there to split over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = {kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if name != "stage"}
    return mesh if {*AXES} - {"stage"} <= {*mesh.axis_names} and types == {AxisType.Auto} else None


def fit(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """`spec` without mesh axes of one device, and without those that do not divide their axis of `shape`.

    The latter are those of a vocabulary, `stage` before the others, and of the one sequence that diagnostics look at.
    """
    sizes = dict(mesh.shape)
    axes = []
    for entry, size in zip(spec, shape, strict=True):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        names = tuple(name for name in names if sizes.get(name, 1) > 1)
        for rest in (names, tuple(name for name in names if name != "stage"), ()):
            if size % math.prod(sizes[name] for name in rest) == 0:
                axes.append(rest or None)
                break
    return PartitionSpec(*axes)


def constrain(x: Array, *logical: str | None) -> Array:
    """`x` split over the mesh as its logical axes say; `x` itself without a mesh."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit(mesh, RULES.spec(*logical), x.shape))


def on_own_part(function: Callable[..., Array], logical: tuple[str | None, ...], *arrays: Array) -> Array:
    """`function(*arrays)` under `jax.shard_map`, arrays and result split alike: for kernels, which GSPMD cannot look into.

    Args:
      function: needs no other part of the split axes than its own.
      logical: axes of all arrays and of the result; what `fit` leaves out for the first array is not split.
      *arrays: of the same number of axes.
    """
    mesh = current()
    if mesh is None:
        return function(*arrays)
    spec = fit(mesh, RULES.spec(*logical), arrays[0].shape)
    # JAX's flash attention does not say what varies between devices.
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def token_axes(shape: Sequence[int]) -> PartitionSpec:
    """Mesh axes of tokens [B, T], for `mhc_kernels.settings`; empty without a mesh."""
    mesh = current()
    return PartitionSpec() if mesh is None else fit(mesh, RULES.spec("batch", "sequence"), shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of inputs and targets [B, T]."""
    return NamedSharding(mesh, RULES.spec("batch", "sequence"))


def own_rows(mesh: Mesh, shape: tuple[int, int]) -> np.ndarray:
    """Rows of a batch [B, T] that the devices of this process hold, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[part[0]] for part in parts if part is not None]))


def global_batch(mesh: Mesh, shape: tuple[int, int], rows: np.ndarray, own: np.ndarray) -> Array:
    """A batch [B, T] over the devices of all processes, each of which gives the rows [len(rows), T] that it read (`own_rows`)."""

    def part(index: Any) -> np.ndarray:
        return own[np.searchsorted(rows, np.arange(shape[0])[index[0]]), index[1]]

    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def everywhere(mesh: Mesh, a: np.ndarray) -> Array:
    """The same array on the devices of all processes, each of which has it."""
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, PartitionSpec()), lambda _: a)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """Shardings of a train state, or of parameters: optimizer moments lie like their parameters, scalars are on every device.

    Args:
      mesh: of `make_mesh` or `abstract_mesh`.
      state: arrays, or their shapes and dtypes (`jax.eval_shape`).

    Raises:
      ValueError: a parameter that `PARAMETERS` does not know.
    """

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = logical_axes(path_of(key_path), len(leaf.shape))
        return NamedSharding(mesh, fit(mesh, RULES.spec(*axes), leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)
