r"""DeepSeekMoE (Dai et al., arXiv 2401.06066): all shared experts and k of the E routed experts process each token.

The router and the balancing of loads are as in DeepSeek-V3 (arXiv 2412.19437, Eq. 12-16; Wang et al., arXiv 2408.15664):

    $s = \sigma(x W_{router}), \qquad \mathcal{K} = \text{the k largest of } s_e + b_e, \qquad
    g_e = \mathrm{scale} \cdot s_e / \sum_{j \in \mathcal{K}} s_j$
    $y = \mathrm{shared}(x) + \sum_{e \in \mathcal{K}} g_e\, \mathrm{expert}_e(x)$
    after each step: $b_e \leftarrow b_e + \gamma\, \mathrm{sign}(\overline{\mathrm{load}} - \mathrm{load}_e)$ (`balanced_bias`)

The gate $g_e$ of an expert weighs its output.  The bias b only takes part in the choice of experts, so no gradient reaches it.
Tokens are sorted by expert, and each expert multiplies its group of tokens, however large the group is (`layers.grouped_matmul`).
No token is dropped, unless the setting `buffer` of model.experts limits the number of rows that a device has room for.

Deviations: DeepSeek-V3 limits the groups of devices that a token is sent to, and has a sequence-wise auxiliary loss.  This code has
neither.

Under a mesh (`routed_on_mesh`) each of ep devices owns E/ep experts.  A device chooses experts for its own N tokens, and sends a
copy of a token to the owner of each chosen expert.  An owner has room for `capacity` rows (copies):

    k copies of each of the N tokens, sorted by expert                    [N k, C]
    dispatch: all-to-all over the mesh axis `expert`, sorted by expert    [capacity, C]
    SwiGLU of the E/ep experts of this device, in groups                  [capacity, C]
    combine: all-to-all                                                   [N k, C]
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.layers.expert_exchange import exchange, plan, worst_case
from mhc_jax.layers.grouped_matmul import grouped_matmul
from mhc_jax.layers.mlp import gated, swiglu
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import RULES, current, token_axes


class Experts(NamedTuple):
    """SwiGLU matrices of the routed experts, in the dtype in which they are multiplied, or the shardings of these matrices."""

    W_gate: Any
    """Matrices W_gate [E, C, F] of SwiGLU, one for each of the E experts."""
    W_up: Any
    """Matrices W_up [E, C, F] of SwiGLU, one for each of the E experts."""
    W_down: Any
    """Matrices W_down [E, F, C] of SwiGLU, one for each of the E experts."""


ROUTED_SCALE = 1.0
"""Sum of the gates of the chosen experts of a token, by which their outputs are weighted (DeepSeek-V3, Eq. 13)."""
BALANCING_RATE = 1e-3
"""Amount gamma by which each step changes the biases of a router, to make the loads of experts even (DeepSeek-V3, section 4.2)."""


def route(
    x: Float[Array, "N C"], W: Float[Array, "C E"], bias: Float[Array, " E"], k: int, scale: float
) -> tuple[Int[Array, "N k"], Float[Array, "N k"], Float[Array, "N E"]]:
    """Choose k experts for each token (DeepSeek-V3 Eq. 13-16), with all numbers in float32.

    An expert with a score of NaN is chosen first.  The gates of the token are then NaN, so that the NaN stays visible.

    Args:
      x: tokens, float32.
      W: weights W_router.
      bias: bias b of each expert.
      k: number of experts for each token.
      scale: sum of the gates of a token.

    Returns:
      the chosen experts, their gates g (factors of their outputs), and the scores s of all experts.

    Examples:
      The scores are equal here, so that the bias alone decides the choice, and the gates are equal.

      >>> import jax.numpy as jnp
      >>> experts, gates, _ = route(jnp.zeros((1, 2)), jnp.ones((2, 3)), jnp.array([0.0, 0.2, 0.1]), 2, 1.0)
      >>> print(experts, gates)
      [[1 2]] [[0.5 0.5]]
    """
    scores = jax.nn.sigmoid(jnp.dot(x, W, precision="highest"))
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores + bias[None]), k)
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    # The addition of 1e-20, as in DeepSeek-V3, makes the gates zero and not NaN if all k scores underflow.
    return experts, scale * chosen / (chosen.sum(-1, keepdims=True) + 1e-20), scores


def mix_experts(
    x: Float[Array, "N C"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: Experts,
) -> tuple[Float[Array, "N C"], Int[Array, " E"]]:
    r"""Return the weighted sum of the chosen experts' outputs for each token, and the number of tokens of each expert.

    The sum is $\sum_{e \in \mathcal{K}} g_e\, \mathrm{expert}_e(x)$ over the k chosen experts with gates $g_e$.  Matrices are
    multiplied in the dtype of x.  The sum is computed in float32 and returned in the dtype of x.
    """
    rows, order, load = sorted_copies(x, experts, len(weights.W_gate))
    out = grouped_swiglu(rows, weights, load)
    return weighted_sum(out, order, gates).astype(x.dtype), load


def sorted_copies(
    x: Float[Array, "N C"], experts: Int[Array, "N k"], num_experts: int
) -> tuple[Float[Array, "M C"], Int[Array, " M"], Int[Array, " E"]]:
    """Make a copy of each token for each of its k experts.

    Returns:
      the M = N k copies sorted by expert, the permutation that sorts them, and the number of copies for each expert.
    """
    N, k = experts.shape
    order = jnp.argsort(experts.reshape(-1), stable=True)
    load = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)
    # Tokens are copied before they are sorted.  The backward pass then undoes the sort without a sum, and adds the gradients of the
    # k copies of a token in the same order on every device.
    copies = jnp.broadcast_to(x[:, None], (N, k, x.shape[-1])).reshape(N * k, -1)
    return copies.at[order].get(unique_indices=True), order, load


def grouped_swiglu(rows: Float[Array, "M C"], weights: Experts, groups: Int[Array, " E"]) -> Float[Array, "M C"]:
    """Apply SwiGLU to consecutive groups of rows, with the weights of one expert for each group."""
    hidden = gated(grouped_matmul(rows, weights.W_gate, groups), grouped_matmul(rows, weights.W_up, groups))
    return grouped_matmul(hidden, weights.W_down, groups)


def weighted_sum(rows: Float[Array, "M C"], order: Int[Array, " M"], gates: Float[Array, "N k"]) -> Float[Array, "N C"]:
    """Return the sum of each token's k rows, weighted by its gates, in float32.

    `rows` are sorted by expert, as `sorted_copies` sorts them, and `order` is the permutation that it returned.
    """
    out = rows.at[jnp.argsort(order)].get(unique_indices=True).reshape(*gates.shape, -1)
    return jnp.einsum("nkc,nk->nc", out.astype(jnp.float32), gates, precision="highest")


def mix_experts_of_owners(
    x: Float[Array, "N C"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    weights: Experts,
    axis: str,
    buffer: float = 0.0,
) -> tuple[Float[Array, "N C"], Int[Array, " E"], Int[Array, ""]]:
    """Do the same as `mix_experts` for the tokens of this device, if each of the ep devices of `axis` owns E/ep experts.

    Args:
      x, experts, gates: tokens of this device, their chosen experts (numbers from 0 to E - 1) and their gates.
      weights: weights of the E/ep experts that this device owns.
      axis: mesh axis of the surrounding shard_map.
      buffer: number of rows that an owner has room for, in multiples of N k.  With even loads an owner gets N k rows.  0: room
        for the worst case.

    Returns:
      the weighted sum in float32, the number of this device's tokens for each of the E experts, and the number of rows that this
      device got as an owner.
    """
    N, k = experts.shape
    ep = jax.lax.axis_size(axis)
    E = ep * len(weights.W_gate)
    most = worst_case(N * k, k, E, ep)
    capacity = min(most, math.ceil(buffer * N * k)) if buffer else most
    rows, order, load = sorted_copies(x, experts, E)
    dispatch, combine, groups = plan(load, axis, None if capacity == most else capacity)
    pair = min(most // ep, capacity)
    # The number of rows is rounded up to a multiple of 128.  With 1,500 rows libtpu 0.0.42 turned ragged_dot into dense products
    # of all rows with all experts.
    room = -(-capacity // 128) * 128
    rows = exchange(rows, dispatch, combine, room, pair, axis)
    # Rows after those of the last expert belong to no expert, and ragged_dot may leave any values in them.
    inside = (jnp.arange(room) < groups.sum())[:, None]
    out = grouped_swiglu(jnp.where(inside, rows, 0), weights, groups)
    out = exchange(jnp.where(inside, out, 0), combine, dispatch, N * k, pair, axis)
    return weighted_sum(out, order, gates), load, groups.sum()


def routed(
    x: Float[Array, "B T C"],
    W_router: Float[Array, "C E"],
    bias: Float[Array, " E"],
    weights: Experts,
    *,
    k: int,
    scale: float,
    shards: tuple[str, ...] = (),
    owners: str | None = None,
    hidden: str | None = None,
    buffer: float = 0.0,
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """Apply router and routed experts to the tokens of this device.

    Three arguments name mesh axes of the surrounding shard_map, if it has such axes: tokens are sharded over `shards`, experts over
    `owners`, and hidden channels of the experts over `hidden`.  The other arguments and the results are as in `routed_on_mesh`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates, scores = route(tokens, W_router, bias, k, scale)
    tokens, entropy, dropped = tokens.astype(weights.W_gate.dtype), score_entropy(scores), jnp.zeros(())
    if hidden:
        # `pcast` marks the tokens as differing between the devices of the mesh axis `hidden`, and its gradient is a sum over these
        # devices.  It is applied before each token is copied k times, so that the sum is over N rows and not over N k.
        tokens = jax.lax.pcast(tokens, hidden, to="varying")
    if owners:
        y, load, seen = mix_experts_of_owners(tokens, experts, gates, weights, owners, buffer)
        load, seen = jax.lax.psum((load, seen), shards)
        dropped = 1 - seen / load.sum()
    else:
        y, load = mix_experts(tokens, experts, gates, weights)
        load = jax.lax.psum(load, shards) if shards else load
    y = jax.lax.psum(y, hidden) if hidden else y
    aux = {
        "expert_load": load.astype(jnp.float32),
        "router_entropy": jax.lax.pmean(entropy, shards) if shards else entropy,
        "router_dropped": dropped,
    }
    return y.astype(tokens.dtype).reshape(x.shape), aux


def routed_on_mesh(
    x: Float[Array, "B T C"],
    W_router: Float[Array, "C E"],
    bias: Float[Array, " E"],
    weights: Experts,
    *,
    k: int,
    scale: float,
    mesh: Mesh | AbstractMesh,
    tokens: PartitionSpec,
    axes: PartitionSpec,
    buffer: float = 0.0,
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """Apply router and routed experts (`routed`) to tokens and experts that are sharded over a mesh, without gathering tokens.

    Every device has the whole weights and biases of the router.  If the channels C of the experts' weights are sharded, these
    weights are gathered before use, and their gradients are summed by a reduce-scatter.  If the hidden channels F are sharded, the
    devices of that mesh axis handle the same tokens, and their partial results are summed.

    Args:
      x: tokens, float32, sharded as `tokens` says.  The mesh axis of the experts must be among the axes of `tokens`.
      W_router, bias, k, scale: arguments of `route`.
      weights: weights of the experts in the compute dtype, sharded as `axes` says.
      mesh: any mesh.  Axes of size 1 are ignored.  If experts are not sharded, no row is sent to another device.
      tokens: mesh axes over which the axes [B, T] of the tokens are sharded.
      axes: mesh axis over which each of the axes [E, C, F] of the weights is sharded, or None.
      buffer: argument of `mix_experts_of_owners`.

    Returns:
      y in the compute dtype, and float32 values over the tokens of all devices, as in `MoE.__call__`: expert_load [E],
      router_entropy [] and router_dropped [].
    """

    def present(entry):
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple(axis for axis in names if axis is not None and mesh.shape[axis] > 1)

    rows, columns = present(tokens[0]), present(tokens[1])
    owners, inner, hidden = (next(iter(present(entry)), None) for entry in axes)

    def local(x, W_router, bias, weights):
        if inner:
            W_gate, W_up = (jax.lax.all_gather(W, inner, axis=1, tiled=True) for W in weights[:2])
            weights = Experts(W_gate, W_up, jax.lax.all_gather(weights.W_down, inner, axis=2, tiled=True))
        how = {"k": k, "scale": scale, "shards": rows + columns, "owners": owners, "hidden": hidden, "buffer": buffer}
        return routed(x, W_router, bias, weights, **how)

    W_in, W_out = PartitionSpec(owners, inner, hidden), PartitionSpec(owners, hidden, inner)
    token_spec, whole = PartitionSpec(rows or None, columns or None, None), PartitionSpec()
    in_specs = (token_spec, whole, whole, Experts(W_in, W_in, W_out))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(token_spec, whole))
    return sharded(x, W_router, bias, weights)


def balanced_bias(bias: Float[Array, "M E"], load: Float[Array, "M E"], rate: float) -> Float[Array, "M E"]:
    r"""Move the biases of the routers of M layers by one step of auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1).

    Return $b_e + \gamma\, \mathrm{sign}(\overline{\mathrm{load}} - \mathrm{load}_e)$, with the mean load of all experts of a layer.

    Args:
      bias: bias b of each expert.
      load: number of tokens of each expert in the last step.
      rate: the rate gamma (`BALANCING_RATE`).

    Examples:
      >>> import jax.numpy as jnp
      >>> print(balanced_bias(jnp.zeros((1, 3)), jnp.array([[6.0, 3.0, 0.0]]), 0.5))
      [[-0.5  0.   0.5]]
    """
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def router_health(
    load: Float[Array, "M E"], entropy: Float[Array, " M"], bias: Float[Array, "M E"]
) -> dict[str, Float[Array, " M"]]:
    """Return four numbers that describe how evenly the router of each of M layers spreads tokens over experts.

    They are 0, 1, 1 and 0 if all loads, all scores and all biases are equal.

    Args:
      load: number of tokens of each expert.
      entropy: mean entropy of the scores of each router (`score_entropy`).
      bias: bias b of each expert.

    Returns:
      router_load_cv (standard deviation of the loads, divided by their mean), router_max_load (largest load, divided by the mean),
      router_entropy, and router_bias_range (largest bias minus smallest bias).
    """
    mean = load.mean(-1)
    return {
        "router_load_cv": load.std(-1) / mean,
        "router_max_load": load.max(-1) / mean,
        "router_entropy": entropy,
        "router_bias_range": bias.max(-1) - bias.min(-1),
    }


class MoE(nn.Module):
    """The feed-forward branch with experts: RMSNorm, then shared and routed SwiGLU experts.

    Weights are [in, out] and [expert, in, out].  They start as N(0, 1/in), and W_down starts as N(0, 1/in) times `output_scale`.
    The outputs of shared experts are added without weights.  All shared experts are therefore computed as one SwiGLU
    with `num_shared` times the hidden channels of an expert.
    """

    num_experts: int
    """Number E of routed experts."""
    num_active: int
    """Number k of routed experts that are chosen for each token."""
    num_shared: int
    """Number of shared experts.  0: there are none."""
    hidden: int
    """Number F of hidden channels of one expert."""
    routed_scale: float
    """Sum of the gates of the chosen experts of a token, by which their outputs are weighted."""
    norm_eps: float
    output_scale: float
    """Factor by which the initial output matrices W_down are multiplied."""
    dtype: Any
    """Dtype in which matrices are multiplied."""
    buffer: float = 0.0
    """Number of rows that each device has room for, if experts are sharded over a mesh, in multiples of the number that it gets
    with even loads.  0: room for the worst case (`mix_experts_of_owners`)."""

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Return the output of the branch in `dtype`, and auxiliary values of the router.

        Auxiliary values, float32: expert_load [E] (number of tokens of each expert), router_entropy [] (`score_entropy`),
        router_dropped [] (share of the pairs of token and chosen expert that were dropped) and router_bias [E].
        """
        C, E, F = h.shape[-1], self.num_experts, self.hidden
        x = RMSNorm(self.norm_eps, name="norm")(h)

        def init(scale: float = 1.0, **axes: Any) -> nn.initializers.Initializer:
            return nn.initializers.variance_scaling(scale**2, "fan_in", "normal", **axes)

        W_router = self.param("W_router", init(), (C, E))
        bias = self.param("router_bias", nn.initializers.zeros, (E,))
        weights = Experts(
            self.param("W_gate", init(batch_axis=(0,)), (E, C, F)).astype(self.dtype),
            self.param("W_up", init(batch_axis=(0,)), (E, C, F)).astype(self.dtype),
            self.param("W_down", init(self.output_scale, batch_axis=(0,)), (E, F, C)).astype(self.dtype),
        )
        mesh, tokens = current(), token_axes(h.shape[:2])
        how = {"k": self.num_active, "scale": self.routed_scale}
        # tokens[0] is None if the batch is not sharded, as for the few tokens of initialisation or the one sequence of diagnostics.
        if mesh is None or tokens[0] is None:
            y, aux = routed(x, W_router, bias, weights, **how)
        else:
            axes = RULES.spec("expert", "embed", "hidden")
            how |= {"mesh": mesh, "tokens": tokens, "axes": axes, "buffer": self.buffer}
            y, aux = routed_on_mesh(x, W_router, bias, weights, **how)
        if self.num_shared:
            y = y + swiglu(self, "W_shared", x.astype(self.dtype), self.num_shared * F, self.output_scale)
        return y, jax.lax.stop_gradient({**aux, "router_bias": bias})


def score_entropy(scores: Float[Array, "N E"]) -> Float[Array, ""]:
    r"""Return the entropy of a token's scores s, divided by ln E and averaged over tokens.

    It is $-\sum_e p_e \ln p_e / \ln E$ with $p = s / \sum_e s_e$: 1 if all scores are equal.  For E = 1 it is 0.
    """
    E = scores.shape[-1]
    if E == 1:
        return jnp.zeros(())
    p = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    return jax.scipy.special.entr(p).sum(-1).mean() / jnp.log(float(E))
