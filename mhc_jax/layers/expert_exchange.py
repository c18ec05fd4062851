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

    E/ep of each are between this device and each of the ep devices, its peers.  Slices are ordered by peer, then by expert.
    """

    start: Int[Array, " E"]
    """Index of the first row of each slice that this device sends, among its rows."""
    size: Int[Array, " E"]
    """Number of rows of each slice that this device sends."""
    landing: Int[Array, " E"]
    """Index of the first row of each slice that this device sends, in the result of the device that receives it."""
    received: Int[Array, " E"]
    """Number of rows of each slice that this device receives."""
    place: Int[Array, " E"]
    """Index of the first row of each slice that this device receives, in its result."""


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
    loads = jax.lax.all_gather(load, axis)  # number of rows of each device for each expert, [source, E]
    start = jnp.cumsum(loads, 1) - loads
    size = loads
    if capacity is not None:
        total = loads.reshape(ep, ep, -1).sum((0, 2))
        # The kept share is slightly less than capacity / total, so that rounding in float32 cannot make the slices exceed capacity.
        share = jnp.where(total <= capacity, 1.0, capacity / jnp.maximum(total, 1) * (1 - 1e-6))
        size = jnp.floor(loads * jnp.repeat(share, E // ep)[None]).astype(load.dtype)
    by_owner = size.reshape(ep, ep, -1).transpose(1, 2, 0)  # [owner, expert, source], the order in which an owner stores slices
    ends = jnp.cumsum(by_owner.reshape(ep, -1), 1).reshape(by_owner.shape)
    landing = (ends - by_owner).transpose(2, 0, 1)  # [source, owner, expert]
    # `sent` and `received` describe the slices that this device sends and receives in `dispatch`: first row at the sender, number
    # of rows, first row at the owner.
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
      pair: largest number of rows between this device and one peer.
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
    # Of `rows` the backward pass needs only their number, which an array without columns keeps.
    return _move(rows, transfer, reverse, num_rows, pair, axis), (transfer, reverse, rows[:, :0])


def _backward(num_rows, pair, axis, saved, g):
    transfer, reverse, rows = saved
    return _move(g, reverse, transfer, rows.shape[0], pair, axis), None, None


_exchange: Any = jax.custom_vjp(_move, nondiff_argnums=(3, 4, 5))
_exchange.defvjp(_forward, _backward)


def _dense(rows, transfer, num_rows, pair, axis):
    """Exchange rows by an ordinary all-to-all of buffers [ep, pair, C], for backends without a ragged all-to-all."""
    ep = jax.lax.axis_size(axis)

    def places(start, size, beyond):
        """Return the index of the t-th row of each peer's slices as an array [ep, pair], with `beyond` after the last such row."""
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
