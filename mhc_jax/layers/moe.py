"""DeepSeekMoE (Dai et al., arXiv 2401.06066): shared experts that see every token, and routed ones of which a token sees k.

Router and balancing are those of DeepSeek-V3 (arXiv 2412.19437, Eq. 12-16; Wang et al., arXiv 2408.15664):

    s = sigmoid(x W_router),   chosen = the k largest of s + b,   g_e = scale s_e / sum over chosen of s,
    y = shared(x) + sum over chosen of g_e expert_e(x),   after each step  b_e += gamma sign(mean load - load_e)

The bias b chooses but does not weigh: no gradient reaches it.  No token is dropped and no expert has a capacity: tokens are
sorted by expert and multiplied in groups of the sizes that occur (`layers.grouped`).  Without V3's groups of devices and
its sequence-wise auxiliary loss, which are about machines and single sequences.

Under a mesh (`routed_on_mesh`) each device routes its own tokens and sends copies of them to the owners of the experts:

    copies of the N local tokens, sorted by expert                     [N k, C]
    there: all-to-all over the axis of experts, sorted by expert       [capacity, C]
    SwiGLU of the E/ep own experts, in groups
    back: all-to-all                                                   [N k, C]
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.layers.exchange import exchange, plan, worst_case
from mhc_jax.layers.grouped import grouped_matmul
from mhc_jax.layers.norm import RMSNorm
from mhc_jax.parallel.sharding import RULES, constrain, current, token_axes

ROUTED_SCALE = 1.0
"""What the gates of a token's routed experts sum to (DeepSeek-V3, Eq. 13)."""
BALANCING_RATE = 1e-3
"""gamma, by which a step moves the bias of a router towards even loads (DeepSeek-V3, section 4.2)."""


def route(
    x: Float[Array, "N C"], W: Float[Array, "C E"], bias: Float[Array, " E"], k: int, scale: float
) -> tuple[Int[Array, "N k"], Float[Array, "N k"], Float[Array, "N E"]]:
    """(chosen experts, their gates, scores of all experts), float32 throughout.

    A score of NaN counts as the largest, and the gates of that token are NaN then: what is not finite stays visible.

    Args:
      x: tokens, float32.
      W: W_router.
      bias: b.
      k: experts a token sees.
      scale: what the gates of a token sum to.
    """
    scores = jax.nn.sigmoid(jnp.dot(x, W, precision="highest"))
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores + bias[None]), k)
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    # 1e-20 as in DeepSeek-V3: k scores that all underflow give gates of zero.
    return experts, scale * chosen / (chosen.sum(-1, keepdims=True) + 1e-20), scores


def mix_experts(
    x: Float[Array, "N C"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    W_gate: Float[Array, "E C F"],
    W_up: Float[Array, "E C F"],
    W_down: Float[Array, "E F C"],
) -> tuple[Float[Array, "N C"], Int[Array, " E"]]:
    """sum over chosen of g_e (silu(x W_gate_e) * (x W_up_e)) W_down_e, and the load: tokens of each expert.

    Products in the dtype of x, the weighted sum in float32, the result in the dtype of x.
    """
    rows, order, load = sorted_copies(x, experts, W_gate.shape[0])
    out = grouped_swiglu(rows, W_gate, W_up, W_down, load)
    return weighted_sum(out, order, gates).astype(x.dtype), load


def sorted_copies(
    x: Float[Array, "N C"], experts: Int[Array, "N k"], num_experts: int
) -> tuple[Float[Array, "M C"], Int[Array, " M"], Int[Array, " E"]]:
    """Copies of the tokens sorted by expert (M = N k), the order that sorts them, and how many go to each expert."""
    N, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    load = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    # Copies first, then a permutation: its gradient scatters to unique places, so it adds in a fixed order on any device.
    copies = jnp.broadcast_to(x[:, None], (N, k, x.shape[-1])).reshape(N * k, -1)
    return copies.at[order].get(unique_indices=True), order, load


def grouped_swiglu(
    rows: Float[Array, "M C"],
    W_gate: Float[Array, "E C F"],
    W_up: Float[Array, "E C F"],
    W_down: Float[Array, "E F C"],
    groups: Int[Array, " E"],
) -> Float[Array, "M C"]:
    """SwiGLU of consecutive groups of rows, each by its own expert."""
    hidden = nn.silu(grouped_matmul(rows, W_gate, groups)) * grouped_matmul(rows, W_up, groups)
    return grouped_matmul(hidden, W_down, groups)


def weighted_sum(rows: Float[Array, "M C"], order: Int[Array, " M"], gates: Float[Array, "N k"]) -> Float[Array, "N C"]:
    """sum over chosen of g_e row_e, float32, of rows in the order of `sorted_copies`."""
    out = rows.at[jnp.argsort(order)].get(unique_indices=True).reshape(*gates.shape, -1)
    return jnp.einsum("nkc,nk->nc", out.astype(jnp.float32), gates, precision="highest")


def mix_experts_of_owners(
    x: Float[Array, "N C"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    W_gate: Float[Array, "own C F"],
    W_up: Float[Array, "own C F"],
    W_down: Float[Array, "own F C"],
    axis: str,
    buffer: float = 0.0,
) -> tuple[Float[Array, "N C"], Int[Array, " E"], Int[Array, ""]]:
    """`mix_experts` of this device's tokens with experts that the ep devices of `axis` own, E/ep each; float32.

    Args:
      x: tokens of this device, as `experts` and `gates`; the numbers of experts count through all E.
      W_gate: of the experts that this device owns, as W_up and W_down.
      axis: mesh axis, within its shard_map.
      buffer: rows an owner has room for, in multiples of N k, what it gets when loads are even; 0: the worst case.

    Returns:
      The weighted sum, the load of this device's tokens, and how many rows this device, as an owner, got.
    """
    N, k = experts.shape
    ep = jax.lax.axis_size(axis)
    E = ep * W_gate.shape[0]
    most = worst_case(N * k, k, E, ep)
    capacity = min(most, math.ceil(buffer * N * k)) if buffer else most
    rows, order, load = sorted_copies(x, experts, E)
    there, back, groups = plan(load, axis, None if capacity == most else capacity)
    pair = min(most // ep, capacity)
    # A round number: libtpu 0.0.42 makes a kernel of ragged_dot with 1,504 rows, and dense products with all experts of 1,500.
    room = -(-capacity // 128) * 128
    rows = exchange(rows, there, back, room, pair, axis)
    # Rows beyond the groups belong to no expert, and ragged_dot promises nothing about them.
    inside = (jnp.arange(room) < groups.sum())[:, None]
    out = grouped_swiglu(jnp.where(inside, rows, 0), W_gate, W_up, W_down, groups)
    out = exchange(jnp.where(inside, out, 0), back, there, N * k, pair, axis)
    return weighted_sum(out, order, gates), load, groups.sum()


def routed(
    x: Float[Array, "B T C"],
    W_router: Float[Array, "C E"],
    bias: Float[Array, " E"],
    W_gate: Float[Array, "E C F"],
    W_up: Float[Array, "E C F"],
    W_down: Float[Array, "E F C"],
    k: int,
    scale: float,
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """`route` and `mix_experts`; arguments and results as those of `routed_on_mesh`."""
    rows = x.reshape(-1, x.shape[-1])
    experts, gates, scores = route(rows, W_router, bias, k, scale)
    y, load = mix_experts(rows.astype(W_gate.dtype), experts, gates, W_gate, W_up, W_down)
    told = {
        "expert_load": load.astype(jnp.float32),
        "router_entropy": score_entropy(scores),
        "router_dropped": jnp.zeros(()),
    }
    return y.reshape(x.shape), told


def routed_on_mesh(
    x: Float[Array, "B T C"],
    W_router: Float[Array, "C E"],
    bias: Float[Array, " E"],
    W_gate: Float[Array, "E C F"],
    W_up: Float[Array, "E C F"],
    W_down: Float[Array, "E F C"],
    k: int,
    scale: float,
    mesh: Mesh | AbstractMesh,
    tokens: PartitionSpec,
    weights: PartitionSpec,
    buffer: float = 0.0,
) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
    """`routed`, of tokens and experts that are sharded over a mesh; no token is gathered.

    Router weights and bias are whole on every device.  Where C of the weights is sharded they are gathered, and their
    gradients leave as a reduce-scatter.  Where F is, each device of that axis sends the same rows, and partial y are added up.

    Args:
      x: tokens, float32, sharded by `tokens`; the axis of experts must be among those.
      W_router, bias, k, scale: see `route`.
      W_gate: in the compute dtype, as W_up and W_down.
      mesh: any; axes of size 1 are as if they were not there, and without an axis of experts nothing is sent.
      tokens: axes of [B, T].
      weights: axes of [E, C, F], one or None each.
      buffer: see `mix_experts_of_owners`.

    Returns:
      y in the compute dtype, and of all tokens, float32: expert_load [E], router_entropy [] (see `MoE`), router_dropped []
      (share of the copies that no expert saw).
    """

    def present(entry):
        axes = entry if isinstance(entry, tuple) else (entry,)
        return tuple(axis for axis in axes if axis is not None and mesh.shape[axis] > 1)

    rows, columns = present(tokens[0]), present(tokens[1])
    shards = rows + columns
    owners, inner, hidden = (next(iter(present(entry)), None) for entry in weights)

    def local(x, W_router, bias, W_gate, W_up, W_down):
        own = x.reshape(-1, x.shape[-1])
        experts, gates, scores = route(own, W_router, bias, k, scale)
        own = own.astype(W_gate.dtype)
        if inner:
            W_gate, W_up = (jax.lax.all_gather(W, inner, axis=1, tiled=True) for W in (W_gate, W_up))
            W_down = jax.lax.all_gather(W_down, inner, axis=2, tiled=True)
        if hidden:
            # Here, so that gradients of the tokens are added up over `hidden`, not those of the k copies of each.
            own = jax.lax.pcast(own, hidden, to="varying")
        if owners:
            y, load, seen = mix_experts_of_owners(own, experts, gates, W_gate, W_up, W_down, owners, buffer)
        else:
            y, load = mix_experts(own, experts, gates, W_gate, W_up, W_down)
            seen = load.sum()
        y = jax.lax.psum(y, hidden) if hidden else y
        load, seen = jax.lax.psum((load, seen), shards)
        told = {
            "expert_load": load.astype(jnp.float32),
            "router_entropy": jax.lax.pmean(score_entropy(scores), shards),
            "router_dropped": 1 - seen / load.sum(),
        }
        return y.astype(own.dtype).reshape(x.shape), told

    W_in, W_out = PartitionSpec(owners, inner, hidden), PartitionSpec(owners, hidden, inner)
    token_spec, whole = PartitionSpec(rows or None, columns or None, None), PartitionSpec()
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(token_spec, whole, whole, W_in, W_in, W_out), out_specs=(token_spec, whole)
    )
    return sharded(x, W_router, bias, W_gate, W_up, W_down)


def balanced_bias(bias: Float[Array, "M E"], load: Float[Array, "M E"], rate: float) -> Float[Array, "M E"]:
    """b_e + gamma sign(mean load - load_e), one step of auxiliary-loss-free balancing of M layers."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def router_health(
    load: Float[Array, "M E"], entropy: Float[Array, " M"], bias: Float[Array, "M E"]
) -> dict[str, Float[Array, " M"]]:
    """Numbers a layer from its loads: each 0, 1, 1, 0 when tokens are spread evenly and the bias has not moved.

    router_load_cv (standard deviation of the loads over their mean), router_max_load (largest over mean), router_entropy
    (as `MoE` gives it), router_bias_range (largest less smallest).
    """
    mean = load.mean(-1)
    return {
        "router_load_cv": load.std(-1) / mean,
        "router_max_load": load.max(-1) / mean,
        "router_entropy": entropy,
        "router_bias_range": bias.max(-1) - bias.min(-1),
    }


class MoE(nn.Module):
    """A branch: RMSNorm, then shared and routed SwiGLU experts.

    Weights are [in, out] and [expert, in, out]; all start at N(0, 1/in), W_down at that times `output_scale`.  The S shared
    experts, which are added unweighted, are one SwiGLU of hidden width S F.
    """

    num_experts: int
    num_active: int
    num_shared: int
    hidden: int
    routed_scale: float
    norm_eps: float
    output_scale: float
    dtype: Any
    buffer: float = 0.0
    """Room of an owner of experts under a mesh; see `mix_experts_of_owners`."""

    @nn.compact
    def __call__(self, h: Float[Array, "B T C"]) -> tuple[Float[Array, "B T C"], dict[str, Array]]:
        """Branch output in the compute dtype, and what the router did.

        Auxiliary values, float32: expert_load [E] (tokens), router_entropy [] (mean over tokens of the entropy of their scores,
        normalised to sum 1, over ln E), router_dropped [] (share of the copies of tokens that no expert saw), router_bias [E].
        """
        C = h.shape[-1]
        E, F, S = self.num_experts, self.hidden, self.num_shared * self.hidden
        x = RMSNorm(self.norm_eps, name="norm")(h)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        out_init = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal")
        each = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        each_out = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "normal", batch_axis=(0,))

        W_router = self.param("W_router", init, (C, E))
        bias = self.param("router_bias", nn.initializers.zeros, (E,))
        W_gate = self.param("W_gate", each, (E, C, F)).astype(self.dtype)
        W_up = self.param("W_up", each, (E, C, F)).astype(self.dtype)
        W_down = self.param("W_down", each_out, (E, F, C)).astype(self.dtype)

        weights = W_router, bias, W_gate, W_up, W_down, self.num_active, self.routed_scale
        mesh, tokens = current(), token_axes(h.shape[:2])
        # Tokens that the mesh does not divide: initialisation, and the one sequence of diagnostics.
        if mesh is None or tokens[0] is None:
            y, told = routed(x, *weights)
        else:
            y, told = routed_on_mesh(x, *weights, mesh, tokens, RULES.spec("expert", "embed", "hidden"), self.buffer)
        if S:
            x = x.astype(self.dtype)
            W_shared_gate = self.param("W_shared_gate", init, (C, S)).astype(self.dtype)
            W_shared_up = self.param("W_shared_up", init, (C, S)).astype(self.dtype)
            W_shared_down = self.param("W_shared_down", out_init, (S, C)).astype(self.dtype)
            hidden = constrain(nn.silu(x @ W_shared_gate) * (x @ W_shared_up), "batch", "sequence", "hidden")
            y = y + hidden @ W_shared_down
        return y, jax.lax.stop_gradient({**told, "router_bias": bias})


def score_entropy(scores: Float[Array, "N E"]) -> Float[Array, ""]:
    """Mean entropy of the scores, normalised to sum 1, over ln E: 1 if a router prefers nothing; 0 for E = 1."""
    E = scores.shape[-1]
    if E == 1:
        return jnp.zeros(())
    p = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    return jax.scipy.special.entr(p).sum(-1).mean() / jnp.log(float(E))
