"""Exchange of rows between devices and the owners of their experts, inside `jax.shard_map` over an axis of ep devices.

Each device owns E/ep experts and holds rows sorted by expert.  The slice of rows of expert e goes to the owner of e.  There the
slices land sorted by expert, then by source, so that they are the groups of a ragged matrix product as they are.

On TPUs and GPUs one ragged all-to-all moves exactly these rows.  XLA's CPU backend has none: there slices travel in buffers of
equal size that hold the worst case, by an ordinary all-to-all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import choice


class Transfer(NamedTuple):
    """One direction of an exchange: E slices of rows, E/ep between this device and each peer.

    Every entry is in rows, int32, ordered by peer, then by expert.
    """

    start: Int[Array, " E"]
    """Where the slices to send start among the rows of this device."""
    size: Int[Array, " E"]
    """Sizes of the slices to send."""
    landing: Int[Array, " E"]
    """Where the slices to send start among the rows of the receivers."""
    received: Int[Array, " E"]
    """Sizes of the slices to receive."""
    place: Int[Array, " E"]
    """Where the slices to receive start in the result."""


class Plan(NamedTuple):
    """Both directions of one exchange."""

    dispatch: Transfer
    """From tokens to owners of experts."""
    combine: Transfer
    """Back."""
    groups: Int[Array, " local"]
    """Rows of each of the E/ep experts of this device after `dispatch`."""


def worst_case(num_rows: int, num_active: int, num_experts: int, ep: int) -> int:
    """The largest number of rows that one device can receive of `num_rows` copies on each of ep devices.

    The num_active copies of a token go to different experts, so an owner gets at most min(num_active, E/ep) of them.

    Examples:
      Two devices with 4 tokens each, 2 copies a token, and 2 experts a device: all copies can go to one device.

      >>> worst_case(num_rows=8, num_active=2, num_experts=4, ep=2)
      16
    """
    return ep * (num_rows // num_active) * min(num_active, num_experts // ep)


def plan(load: Int[Array, " E"], axis: str, capacity: int | None = None) -> Plan:
    """Plan which device sends which rows where.

    Args:
      load: rows of this device for each expert.
      axis: mesh axis, within its shard_map.  Its size divides E.
      capacity: rows that an owner has room for; None: all that come.  An owner that would get more drops the same share of every
        slice, at its end.
    """
    ep, me, E = jax.lax.axis_size(axis), jax.lax.axis_index(axis), load.size
    loads = jax.lax.all_gather(load, axis)  # [source, E]
    start = jnp.cumsum(loads, 1) - loads
    size = loads
    if capacity is not None:
        total = loads.reshape(ep, ep, -1).sum((0, 2))
        # Just below the exact share, so that rounding in float32 cannot make the sum of the parts larger than the room.
        share = jnp.where(total <= capacity, 1.0, capacity / jnp.maximum(total, 1) * (1 - 1e-6))
        size = jnp.floor(loads * jnp.repeat(share, E // ep)[None]).astype(load.dtype)
    by_owner = size.reshape(ep, ep, -1).transpose(1, 2, 0)  # [owner, expert, source], the order of the rows there
    ends = jnp.cumsum(by_owner.reshape(ep, -1), 1).reshape(by_owner.shape)
    landing = (ends - by_owner).transpose(2, 0, 1)  # [source, owner, expert]
    # Of the slices that this device sends, and of those that it receives: start at the source, size, start at the owner.
    sent = start[me], size[me], landing[me].reshape(-1)
    received = [a.reshape(ep, ep, -1)[:, me].reshape(-1) for a in (start, size, landing)]
    dispatch = Transfer(*sent, received=received[1], place=received[2])
    combine = Transfer(received[2], received[1], received[0], received=sent[1], place=sent[0])
    return Plan(dispatch, combine, by_owner[me].sum(1))


def exchange(
    rows: Float[Array, "M C"], transfer: Transfer, reverse: Transfer, num_rows: int, pair: int, axis: str
) -> Float[Array, "{num_rows} C"]:
    """The rows that arrive when every device sends its rows along `transfer`; zeros where nothing lands.

    Its transpose sends along `reverse`, so that no rows are added up.

    Args:
      rows: rows of this device.
      transfer: `Plan.dispatch` or `Plan.combine`.
      reverse: the opposite one.
      num_rows: rows of the result.
      pair: rows between this device and one peer, at most.
      axis: mesh axis, within its shard_map.
    """
    return _exchange(rows, transfer, reverse, num_rows, pair, axis)


def _move(rows, transfer, reverse, num_rows, pair, axis):
    if choice.platform() == "cpu":
        return _dense(rows, transfer, num_rows, pair, axis)
    out = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return jax.lax.ragged_all_to_all(
        rows, out, transfer.start, transfer.size, transfer.landing, transfer.received, axis_name=axis
    )


def _forward(rows, transfer, reverse, num_rows, pair, axis):
    # An array without columns carries the number of rows.
    return _move(rows, transfer, reverse, num_rows, pair, axis), (transfer, reverse, rows[:, :0])


def _backward(num_rows, pair, axis, saved, g):
    transfer, reverse, rows = saved
    return _move(g, reverse, transfer, rows.shape[0], pair, axis), None, None


_exchange: Any = jax.custom_vjp(_move, nondiff_argnums=(3, 4, 5))
_exchange.defvjp(_forward, _backward)


def _dense(rows, transfer, num_rows, pair, axis):
    """The same exchange by an all-to-all of [ep, pair, C]."""
    ep = jax.lax.axis_size(axis)

    def places(start, size, beyond):
        """[ep, pair]: the place of the t-th row of each peer's slices, and `beyond` after the last one."""
        start, size = start.reshape(ep, -1), size.reshape(ep, -1)
        ends = jnp.cumsum(size, 1)
        t = jnp.arange(pair)
        slot = jax.vmap(lambda ends: jnp.searchsorted(ends, t, side="right"))(ends)
        inside = slot < size.shape[1]
        slot = jnp.minimum(slot, size.shape[1] - 1)
        at = jnp.take_along_axis(start - ends + size, slot, 1) + t[None]
        return jnp.where(inside, at, beyond)

    sent = rows.at[places(transfer.start, transfer.size, rows.shape[0])].get(mode="fill", fill_value=0)
    came = jax.lax.all_to_all(sent, axis, 0, 0)
    out = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return out.at[places(transfer.place, transfer.received, num_rows)].set(came, mode="drop")
