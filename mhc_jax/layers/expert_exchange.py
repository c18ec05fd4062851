"""Send rows, each of which is the copy of a token for one expert, to the devices that own the experts, and back.

The functions run inside `jax.shard_map` over a mesh axis of ep devices.  Each device owns E/ep experts, and holds rows of its own
tokens, sorted by expert.  It sends its slice of rows for expert e to the owner of e.  The owner stores the slices that it receives
sorted by expert, then by sender.  The rows of an expert are thus one group of a grouped matrix product without another sort.

On TPUs and GPUs one ragged all-to-all moves exactly these rows.  XLA's CPU backend has no ragged all-to-all.  On CPUs an ordinary
all-to-all moves buffers of equal size, which have room for the worst case.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from mhc_kernels import backend_choice


class Transfer(NamedTuple):
    """One direction of an exchange, in which this device sends E slices of rows and receives E slices of rows.

    It sends E/ep slices to each of the ep devices, itself included, and receives as many from each.  Fields are int32, ordered by
    this other device, then by expert.
    """

    start: Int[Array, " E"]
    """For each slice that this device sends, the index of its first row in the array of this device's rows."""
    size: Int[Array, " E"]
    """Number of rows of each slice that this device sends."""
    landing: Int[Array, " E"]
    """For each slice that this device sends, the index of its first row in the result of the device that receives it."""
    received: Int[Array, " E"]
    """Number of rows of each slice that this device receives."""
    place: Int[Array, " E"]
    """For each slice that this device receives, the index of its first row in the result of this device."""


class Plan(NamedTuple):
    """Both directions of one exchange of rows between devices."""

    dispatch: Transfer
    """The transfer of rows from the devices that hold the tokens to the devices that own the experts."""
    combine: Transfer
    """The transfer of rows back from the devices that own the experts to the devices that hold the tokens."""
    groups: Int[Array, " local"]
    """Number of rows that this device receives by `dispatch` for each of its E/ep experts."""


def worst_case(num_rows: int, num_active: int, num_experts: int, ep: int) -> int:
    """Return the largest number of rows that one device can receive, if each of ep devices sends `num_rows` copies of tokens.

    The num_active copies of a token go to different experts.  A device that owns E/ep experts gets at most min(num_active, E/ep)
    of them.

    Examples:
      Two devices have 4 tokens each, with 2 copies of each token, and 2 experts each.  All copies can go to one device.

      >>> worst_case(num_rows=8, num_active=2, num_experts=4, ep=2)
      16
    """
    return ep * (num_rows // num_active) * min(num_active, num_experts // ep)


def plan(load: Int[Array, " E"], axis: str, capacity: int | None = None) -> Plan:
    """Return the plan of an exchange: which rows this device sends to which device, and which it receives.

    Args:
      load: number of rows that this device has for each expert.
      axis: mesh axis of the surrounding shard_map.  Its size divides E.
      capacity: number of rows that an owner of experts has room for.  If more rows would arrive, the same share is dropped from the
        end of every slice for this owner.  None: room for all rows.
    """
    ep, me, E = jax.lax.axis_size(axis), jax.lax.axis_index(axis), load.size
    # loads [ep, E] is the number of rows that each device has for each expert.
    loads = jax.lax.all_gather(load, axis)
    start = jnp.cumsum(loads, 1) - loads
    size = loads
    if capacity is not None:
        total = loads.reshape(ep, ep, -1).sum((0, 2))
        # The kept share is slightly less than capacity / total, so that rounding in float32 cannot make the slices exceed capacity.
        share = jnp.where(total <= capacity, 1.0, capacity / jnp.maximum(total, 1) * (1 - 1e-6))
        size = jnp.floor(loads * jnp.repeat(share, E // ep)[None]).astype(load.dtype)
    # by_owner has the axes [owner, expert, sender], because an owner stores its slices by expert, then by sender.
    by_owner = size.reshape(ep, ep, -1).transpose(1, 2, 0)
    ends = jnp.cumsum(by_owner.reshape(ep, -1), 1).reshape(by_owner.shape)
    # landing has the axes [sender, owner, expert].
    landing = (ends - by_owner).transpose(2, 0, 1)
    # `sent` describes the slices that this device sends in `dispatch`, and `received` those that it receives: index of the first
    # row at the sender, number of rows, index of the first row at the owner.
    sent = start[me], size[me], landing[me].reshape(-1)
    received = [a.reshape(ep, ep, -1)[:, me].reshape(-1) for a in (start, size, landing)]
    dispatch = Transfer(*sent, received=received[1], place=received[2])
    combine = Transfer(received[2], received[1], received[0], received=sent[1], place=sent[0])
    return Plan(dispatch, combine, by_owner[me].sum(1))


def exchange(
    rows: Float[Array, "M C"], transfer: Transfer, reverse: Transfer, num_rows: int, pair: int, axis: str
) -> Float[Array, "{num_rows} C"]:
    """Return the rows that this device receives when every device sends rows as `transfer` says.

    Rows of the result to which no device sends are zeros.  The gradient is exchanged as `reverse` says.  It needs no sums, since
    each row is sent to one device at most.

    Args:
      rows: rows of this device.
      transfer: `Plan.dispatch` or `Plan.combine`.
      reverse: the transfer in the opposite direction.
      num_rows: number of rows of the result.
      pair: largest number of rows that one device sends to one device.
      axis: mesh axis of the surrounding shard_map.
    """
    return _exchange(rows, transfer, reverse, num_rows, pair, axis)


def _move(rows, transfer, reverse, num_rows, pair, axis):
    if backend_choice.platform() == "cpu":
        return _dense(rows, transfer, num_rows, pair, axis)
    out = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return jax.lax.ragged_all_to_all(
        rows, out, transfer.start, transfer.size, transfer.landing, transfer.received, axis_name=axis
    )


def _forward(rows, transfer, reverse, num_rows, pair, axis):
    # The backward pass needs only the number of rows, so an array [M, 0], the rows without columns, is kept for it.
    return _move(rows, transfer, reverse, num_rows, pair, axis), (transfer, reverse, rows[:, :0])


def _backward(num_rows, pair, axis, saved, g):
    transfer, reverse, rows = saved
    return _move(g, reverse, transfer, rows.shape[0], pair, axis), None, None


_exchange: Any = jax.custom_vjp(_move, nondiff_argnums=(3, 4, 5))
_exchange.defvjp(_forward, _backward)


def _dense(rows, transfer, num_rows, pair, axis):
    """Do what `exchange` does by an ordinary all-to-all, with a buffer of `pair` rows for each of the ep devices: [ep, pair, C]."""
    ep = jax.lax.axis_size(axis)

    def places(start, size, beyond):
        """Return the index, in the array of all rows, of the row for each entry of each device's buffer, as an array [ep, pair].

        Slice i has the rows start[i] to start[i] + size[i] - 1 of the array of all rows.  The slices of a device lie one after
        another at the beginning of its buffer.  Entries that no slice fills have the index `beyond`.
        """
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
