"""Rows to the owners of their experts and back, inside `jax.shard_map` over an axis of ep devices that own E/ep experts each.

Every device holds rows sorted by expert.  The slice of rows of expert e goes to the owner of e, where the slices land sorted by
expert, then by source, so that they are the groups of a ragged matrix product as they are.  On TPUs and GPUs one ragged
all-to-all moves just the rows there are; XLA's CPU backend has none, and there slices travel in buffers of equal size that hold
the worst case, by an ordinary all-to-all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import choice


class Way(NamedTuple):
    """E slices of rows, E/ep between this device and each peer, in one direction; in rows, int32, by peer, then by expert."""

    start: Int[Array, " E"]
    """Of the slices to send, in the rows of this device."""
    size: Int[Array, " E"]
    landing: Int[Array, " E"]
    """Of the same slices, in the rows of the receivers."""
    received: Int[Array, " E"]
    """Sizes of the slices that come."""
    place: Int[Array, " E"]
    """Of the slices that come, in the result."""


class Plan(NamedTuple):
    """Both ways of one exchange."""

    there: Way
    back: Way
    groups: Int[Array, " own"]
    """Rows of each of the E/ep own experts once the slices are there."""


def worst_case(num_rows: int, num_active: int, num_experts: int, ep: int) -> int:
    """Rows one device may receive at most of `num_rows` copies on each of ep devices.

    The num_active copies of a token go to different experts, so an owner gets at most min(num_active, E/ep) of them.
    """
    return ep * (num_rows // num_active) * min(num_active, num_experts // ep)


def plan(load: Int[Array, " E"], axis: str, capacity: int | None = None) -> Plan:
    """Who sends which rows where, from the load of each device: its rows of each expert.

    Args:
      load: of this device.
      axis: mesh axis, within its shard_map.  Its size divides E.
      capacity: rows an owner has room for; None: for all that come.  An owner with more drops the same share of every slice,
        the last rows of it.
    """
    ep, me, E = jax.lax.axis_size(axis), jax.lax.axis_index(axis), load.size
    loads = jax.lax.all_gather(load, axis)  # [source, E]: integers, ep E of them
    start = jnp.cumsum(loads, 1) - loads
    size = loads
    if capacity is not None:
        total = loads.reshape(ep, ep, -1).sum((0, 2))
        # Just below the exact share: what float32 rounds must not make the sum of the parts larger than the room.
        share = jnp.where(total <= capacity, 1.0, capacity / jnp.maximum(total, 1) * (1 - 1e-6))
        size = jnp.floor(loads * jnp.repeat(share, E // ep)[None]).astype(load.dtype)
    by_owner = size.reshape(ep, ep, -1).transpose(1, 2, 0)  # [owner, expert, source], the order of the rows there
    ends = jnp.cumsum(by_owner.reshape(ep, -1), 1).reshape(by_owner.shape)
    landing = (ends - by_owner).transpose(2, 0, 1)  # [source, owner, expert]
    mine = [a.reshape(ep, ep, -1)[:, me].reshape(-1) for a in (start, size, landing)]
    own = start[me], size[me], landing[me].reshape(-1)
    there = Way(own[0], own[1], own[2], mine[1], mine[2])
    back = Way(mine[2], mine[1], mine[0], own[1], own[0])
    return Plan(there, back, by_owner[me].sum(1))


def exchange(
    rows: Float[Array, "M C"], way: Way, other: Way, num_rows: int, most: int, axis: str
) -> Float[Array, "{num_rows} C"]:
    """Rows sent along `way`; zeros where nothing lands.  Its transpose sends along `other`, so that no rows are added up.

    Args:
      rows: of this device.
      way: `Plan.there` or `Plan.back`.
      other: the opposite one.
      num_rows: of the result.
      most: rows between this device and one peer, at most.
      axis: mesh axis, within its shard_map.
    """
    return _exchange(rows, way, other, num_rows, most, axis)


def _move(rows, way, other, num_rows, most, axis):
    if choice.platform() == "cpu":
        return _dense(rows, way, num_rows, most, axis)
    out = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return jax.lax.ragged_all_to_all(rows, out, way.start, way.size, way.landing, way.received, axis_name=axis)


def _forward(rows, way, other, num_rows, most, axis):
    # An array without columns carries the number of rows.
    return _move(rows, way, other, num_rows, most, axis), (way, other, rows[:, :0])


def _backward(num_rows, most, axis, saved, g):
    way, other, rows = saved
    return _move(g, other, way, rows.shape[0], most, axis), None, None


_exchange: Any = jax.custom_vjp(_move, nondiff_argnums=(3, 4, 5))
_exchange.defvjp(_forward, _backward)


def _dense(rows, way, num_rows, most, axis):
    """The same by an all-to-all of [ep, most, C]."""
    ep = jax.lax.axis_size(axis)

    def places(start, size, beyond):
        """[ep, most]: where the t-th row of each peer's slices is; `beyond` after the last."""
        start, size = start.reshape(ep, -1), size.reshape(ep, -1)
        ends = jnp.cumsum(size, 1)
        t = jnp.arange(most)
        slot = jax.vmap(lambda ends: jnp.searchsorted(ends, t, side="right"))(ends)
        inside = slot < size.shape[1]
        slot = jnp.minimum(slot, size.shape[1] - 1)
        at = jnp.take_along_axis(start - ends + size, slot, 1) + t[None]
        return jnp.where(inside, at, beyond)

    sent = rows.at[places(way.start, way.size, rows.shape[0])].get(mode="fill", fill_value=0)
    came = jax.lax.all_to_all(sent, axis, 0, 0)
    out = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return out.at[places(way.place, way.received, num_rows)].set(came, mode="drop")
