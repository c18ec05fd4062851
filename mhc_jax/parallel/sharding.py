"""Meshes of devices, and the shardings of arrays over them.

The model's code gives each axis of an array a logical name (`constrain(q, "batch", "sequence", "heads", None)`).  `RULES` says over
which mesh axes each logical axis is sharded, and XLA's partitioner (GSPMD) derives the communication.  The mesh is set by
`jax.set_mesh`.  Without a mesh no function here changes an array, and the program is that of a single device.

| mesh axis | what is sharded over it |
| --- | --- |
| `stage` | blocks: a device computes the blocks of its stages (`mhc_jax/pipeline`) |
| `data` | the batch, and between uses the parameters and the optimizer's state (`gathered`) |
| `fsdp` | the batch and the parameters, which are gathered layer by layer where they are used |
| `tensor` | heads, hidden channels of the feed-forward, and the vocabulary (Megatron, arXiv 1909.08053) |
| `expert` | the batch and the experts of DeepSeekMoE |
| `sequence` | the tokens of a sequence; attention gathers keys and values of all tokens |

Streams [B, T, nC] are sharded along B and T, never along nC.  The parameters of connections are replicated.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mhc_jax.config import AXES, MeshConfig
from mhc_jax.connections.parameter_paths import CONNECTION, STACKED, path_of
from mhc_jax.errors import require


@dataclass(frozen=True)
class Rules:
    """The mesh axes over which each logical axis is sharded.  An empty tuple means that the axis is not sharded."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    sequence: tuple[str, ...] = ("sequence",)
    heads: tuple[str, ...] = ("tensor",)
    """Mesh axes for the axis of heads in an activation, and for the axis of a weight that holds the channels of all heads."""
    hidden: tuple[str, ...] = ("tensor",)
    """Mesh axes for the hidden channels of the feed-forward."""
    vocabulary: tuple[str, ...] = ("tensor",)
    rows: tuple[str, ...] = ("stage", "tensor")
    """Mesh axes for the vocabulary axis of the embedding matrices.  Within a step these matrices are replicated over `stage`."""
    embed: tuple[str, ...] = ("fsdp",)
    """Mesh axes for the axis C of a weight.  The axis C of an activation is not sharded (None)."""
    expert: tuple[str, ...] = ("expert",)
    layer: tuple[str, ...] = ("stage",)
    """Mesh axes for the leading axis of parameters of stacked blocks.  If they do not divide it, it is not sharded (`fit`)."""
    connection: tuple[str, ...] = ()
    """Mesh axes for every axis of the parameters of a connection.  Empty: these parameters are replicated."""

    def spec(self, *logical: str | None) -> PartitionSpec:
        """Return the mesh axes over which each axis of an array is sharded, from its logical axes.  The axis None is not sharded.

        Raises:
          ValueError: two axes of the array would be sharded over the same mesh axis.
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
"""Logical axes of parameters outside connections, as (pattern of the path, logical axes).

The leading axis of stacked blocks is left out.  If the patterns of two rows match a path, the row with as many axes as the
parameter is taken.
"""


CAST = r"(^|/)(W_(?!router)\w+|unembedding)$"
"""Regular expression of the paths of parameters outside connections that the model casts to the compute dtype before every use."""


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Return the logical axes of a parameter, or of one of its optimizer moments, from its path and number of axes.

    Raises:
      ValueError: no row of `PARAMETERS` matches.
    """
    if ndim == 0:  # counters of the optimizer and scalar parameters have no axes
        return ()
    if re.search(CONNECTION, path):
        return ("connection",) * ndim
    layer: tuple[str | None, ...] = ("layer",) if re.search(STACKED, path) else ()
    for pattern, axes in PARAMETERS:
        if re.search(pattern, path) and len(layer + axes) == ndim:
            return layer + axes
    raise ValueError(f"The parameter {path} with {ndim} axes has no logical axes; add a line to sharding.PARAMETERS.")


def parameter_spec(mesh: Mesh | AbstractMesh, path: str, shape: Sequence[int], spread: bool = True) -> PartitionSpec:
    """Return the mesh axes over which each axis of a parameter is sharded, or of its gradient or one of its moments.

    With `spread` every matrix outside connections is also sharded over `data`, along an axis that `data` divides, as it is stored
    between uses (ZeRO, arXiv 1910.02054).  Without, it is sharded as the model computes with it.
    """
    axes = logical_axes(path, len(shape))
    spec, first = fit(mesh, RULES.spec(*axes), shape), int(axes[:1] == ("layer",))
    copies = dict(mesh.shape).get("data", 1)
    # Parameters of connections and vectors are small, so that each device keeps all of them.
    if not spread or copies == 1 or len(shape) - first < 2 or re.search(CONNECTION, path):
        return spec
    entries = list(spec)
    # An axis that is not sharded yet comes first, so that one mesh axis at a time can move (`on_whole_matrices`).
    for k in sorted(range(first, len(shape)), key=lambda k: entries[k] is not None):
        names = (entries[k],) if isinstance(entries[k], str) else entries[k] or ()
        if shape[k] % (copies * math.prod(mesh.shape[name] for name in names)) == 0:
            entries[k] = (*names, "data")
            break
    return PartitionSpec(*entries)


# ---------------------------------------------------------------------------------------------------------------- mesh


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Make the mesh of the first `config.size` devices.  It has all of `AXES`, also axes of size 1.  For one device return None.

    Raises:
      InputError: there are fewer than `config.size` devices, or the run has several processes and the mesh leaves out devices.
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
    """Return the mesh that `make_mesh` makes, but without devices, to compute the shapes of shards."""
    return AbstractMesh(tuple(getattr(config, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager inside which programs shard their arrays over the mesh.

    Programs must be traced, compiled and run inside it.  If the mesh is None, the context manager does nothing.
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def current() -> AbstractMesh | None:
    """Return the mesh under which the calling code is traced, or None if there is no mesh to shard over.

    Inside a `jax.shard_map` over all axes the calling code works on one shard, so the result is None.  The `jax.shard_map` of a
    pipeline is over the axis `stage` alone, and arrays inside it can still be sharded over the other axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = {kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if name != "stage"}
    return mesh if {*AXES} - {"stage"} <= {*mesh.axis_names} and types == {AxisType.Auto} else None


def fit(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """Return the `spec` of an array of this `shape`, without the mesh axes over which the mesh cannot shard the array.

    Mesh axes of size 1 are dropped.  If the product of the mesh axes of an array axis does not divide its size, `stage` is dropped
    (as from a vocabulary), and if that is not enough, all of them (as from a batch of one sequence in diagnostics).
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
    """Shard `x` over the mesh as its logical axes say.  Without a mesh return `x` itself."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit(mesh, RULES.spec(*logical), x.shape))


def on_each_shard(function: Callable[..., Array], logical: tuple[str | None, ...], *arrays: Array) -> Array:
    """Return the result of calling `function` on each shard of its arguments (`jax.shard_map`).

    It serves kernels, which XLA's partitioner (GSPMD) cannot partition.

    Args:
      function: a function whose computation is independent along the sharded axes.
      logical: the logical axes of every array and of the result.  An array with fewer axes has the first ones.
      *arrays: the arguments.  The shape of the first decides which axes can be sharded (`fit`).
    """
    mesh = current()
    if mesh is None:
        return function(*arrays)
    spec = fit(mesh, RULES.spec(*logical), arrays[0].shape)
    # check_vma is off, because JAX's flash attention kernels do not declare which of their values vary between devices.
    specs = tuple(PartitionSpec(*spec[: a.ndim]) for a in arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def on_whole_matrices(
    function: Callable[[Float[Array, "k a b"]], Float[Array, "k a b"]], path: str, x: Float[Array, "*many a b"]
) -> Float[Array, "*many a b"]:
    """Return the result of calling `function` on the matrices of a parameter, or of its gradient, each whole on one device.

    The matrices [a, b] are spread over the devices of the mesh, and come back sharded like the parameter.  They move by all-to-all,
    so that a device sends and receives as much as it holds, instead of gathering every matrix.  A mesh axis that would take more
    zeros than matrices as padding is left out, and its devices compute the same matrices.  Parameters of connections are
    replicated, thin and cheap: every device computes all of theirs.

    Args:
      function: a function of k matrices that treats each by itself and maps zeros to zeros.
      path: path of the parameter.
      x: the parameter's value or gradient.
    """
    mesh = current()
    if mesh is None or re.search(CONNECTION, path):
        return function(x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
    axes = [entry or () for entry in parameter_spec(mesh, path, x.shape)]
    *many, rows, columns = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in axes]
    # The sharded part of each leading axis comes first, so that the axis of matrices is sharded over all of them as it is.
    parts = [math.prod(mesh.shape[name] for name in entry) for entry in many]
    split = [size for part, whole in zip(parts, x.shape, strict=False) for size in (part, whole // part)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2), len(split), len(split) + 1]
    grouped = x.reshape(*split, *x.shape[-2:]).transpose(order)
    flat = grouped.reshape(-1, *x.shape[-2:])

    first = tuple(name for entry in many for name in entry)
    ways, spread = math.prod(parts), set()
    for name in (*rows, *columns, *(n for n in mesh.shape if n not in (*first, *rows, *columns))):
        if ways * mesh.shape[name] < 2 * len(flat):
            ways, spread = ways * mesh.shape[name], spread | {name}
    # One mesh axis moves at a time, from rows or columns to the axis of matrices, because XLA makes an all-to-all of such a move.
    stages, matrices = [(first, rows, columns)], first
    for names, left in ((rows, columns), (columns, ()), (mesh.shape, ())):
        matrices += tuple(n for n in names if n in spread and n not in matrices)
        stages.append((matrices, (), left))

    def move(x: Array, stages: Sequence[tuple[tuple[str, ...], ...]]) -> Array:
        for stage in stages:
            spec = PartitionSpec(*(entry or None for entry in stage))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    missing = -len(flat) % ways
    out = function(move(jnp.pad(flat, ((0, missing), (0, 0), (0, 0))), stages))
    out = move(out, stages[::-1])[: len(flat)].reshape(grouped.shape)
    return out.transpose(np.argsort(order)).reshape(x.shape)


def token_axes(shape: Sequence[int]) -> PartitionSpec:
    """Return the mesh axes over which tokens [B, T] are sharded, for `mhc_kernels.settings`.  Without a mesh it is empty."""
    mesh = current()
    return PartitionSpec() if mesh is None else fit(mesh, RULES.spec("batch", "sequence"), shape)


def token_shards(shape: tuple[int, int]) -> tuple[int, int]:
    """Return into how many shards the mesh splits tokens [B, T] along each axis.  Without a mesh they are (1, 1)."""
    mesh = current()
    if mesh is None:
        return 1, 1
    rows, columns = NamedSharding(mesh, token_axes(shape)).shard_shape(shape)
    return shape[0] // rows, shape[1] // columns


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the inputs and targets of a batch, [B, T]."""
    return NamedSharding(mesh, RULES.spec("batch", "sequence"))


def local_rows(mesh: Mesh, shape: tuple[int, int]) -> np.ndarray:
    """Return the indices of those rows of a batch of shape (B, T) of which this process's devices hold a part, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[part[0]] for part in parts if part is not None]))


def global_batch(mesh: Mesh, shape: tuple[int, int], rows: np.ndarray, values: np.ndarray) -> Array:
    """Make a batch [B, T] that is sharded over the devices of all processes, from the rows that each process has read.

    Args:
      mesh: the mesh over the devices of all processes.
      shape: (B, T).
      rows: the indices of the rows that this process has read (`local_rows`).
      values: the tokens of these rows, [len(rows), T].
    """

    def part(index: Any) -> np.ndarray:
        return values[np.searchsorted(rows, np.arange(shape[0])[index[0]]), index[1]]

    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def replicate(mesh: Mesh, a: np.ndarray) -> Array:
    """Return an array that is replicated over the devices of all processes.  Every process must give the whole array."""
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, PartitionSpec()), lambda _: a)


def gathered(params: Any, dtype: Any) -> Any:
    """Return parameters as the model computes with them: whole along the mesh axis `data`, over which they are stored.

    A matrix that the model would cast to `dtype`, the compute dtype, is cast before it is gathered, which changes no number.  The
    gather then moves half of the bytes of float32.  The dtype None casts nothing.  Without a mesh axis `data`, `params` is returned
    as it is.
    """
    mesh = current()
    if mesh is None or mesh.shape["data"] == 1:
        return params

    def whole(key_path: tuple[Any, ...], a: Array) -> Array:
        path = path_of(key_path)
        if dtype is not None and re.search(CAST, path) and not re.search(CONNECTION, path):
            a = a.astype(dtype)
        return jax.lax.with_sharding_constraint(
            a, NamedSharding(mesh, parameter_spec(mesh, path, a.shape, spread=False))
        )

    return jax.tree_util.tree_map_with_path(whole, params)


def stored(tree: Any) -> Any:
    """Shard parameters or their gradients as they are stored (`parameter_spec`).  Without a mesh axis `data` return `tree`."""
    mesh = current()
    if mesh is None or mesh.shape["data"] == 1:
        return tree

    def place(key_path: tuple[Any, ...], a: Array) -> Array:
        spec = parameter_spec(mesh, path_of(key_path), a.shape)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any, spread: bool = True) -> Any:
    """Return the sharding of each array of a train state, or of a tree of parameters.

    Moments of the optimizer are sharded like their parameters.  Scalars, and other arrays of the optimizer, are replicated.

    Args:
      mesh: a mesh of `make_mesh` or `abstract_mesh`.
      state: a tree of arrays, or of their shapes and dtypes (`jax.eval_shape`).
      spread: whether matrices are sharded over `data` too, as a run stores them (`parameter_spec`).

    Raises:
      ValueError: no row of `PARAMETERS` matches a parameter.
    """

    parameters = getattr(state, "params", state)
    shapes = [(path_of(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)]

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = path_of(key_path)
        moment = any(path.endswith(name) and leaf.shape == shape for name, shape in shapes)
        spec = parameter_spec(mesh, path, leaf.shape, spread) if moment else PartitionSpec(*(None,) * len(leaf.shape))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)
