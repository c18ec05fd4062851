"""One optimizer step, one validation step and one diagnostics step, as pure functions of (state, batch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import connection_module
from mhc_jax.layers.moe import balanced_bias, router_health
from mhc_jax.model import Decoder, cross_entropy
from mhc_jax.optim import optimizer, schedule
from mhc_jax.parallel.sharding import constrain
from mhc_jax.pipeline.executor import pipelined, schedule_of

Batch = dict[str, Int[Array, "B T"]]


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds."""

    step: Any
    """Optimizer updates done, int32 [] (an array, or its shape and dtype)."""
    params: Any
    opt_state: Any


def init_state(config: ExperimentConfig) -> TrainState:
    """Parameters from train.seed.  Branches get the same values under every connection: keys follow parameter paths."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Decoder(config.model).init(jax.random.key(config.train.seed), tokens)["params"]
    tx = optimizer(config.optimizer, config.train.steps, connection_module(config.model.connection))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def gradients(config: ExperimentConfig) -> Callable[[Any, Batch], tuple[tuple[Array, dict[str, Array]], Any]]:
    """(params, batch) -> ((loss, router), gradient), averaged over optimizer.accumulation_steps slices of the batch.

    With mesh.stage they are the microbatches of a pipeline.

    `router` is what the decoder tells of its routers, {} without experts.

    Raises:
      ValueError: model.remat is `auto`, which `remat_plan.resolve` replaces.
    """
    if config.model.remat == "auto":
        raise ValueError("model.remat is 'auto'; give the configuration that `remat_plan.resolve` returns.")
    A = config.optimizer.accumulation_steps
    if (table := schedule_of(config)) is not None:
        return pipelined(config, table)
    model = Decoder(config.model)

    def loss_of(params, batch):
        logits, router = model.apply({"params": params}, batch["inputs"])
        return cross_entropy(logits, batch["targets"]), router

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if A == 1:
        return value_and_grad

    def accumulated(params, batch):
        slices = jax.tree.map(lambda a: a.reshape(A, a.shape[0] // A, *a.shape[1:]), batch)
        slices = jax.tree.map(lambda a: constrain(a, None, "batch", "sequence"), slices)

        def add(total, one):
            return jax.tree.map(jnp.add, total, value_and_grad(params, one)), None

        one = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda a: a[0], slices))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
        total, _ = jax.lax.scan(add, zero, slices)
        return jax.tree.map(lambda a: a / A, total)

    return accumulated


def move_router_bias(params: Any, before: Any, load: Float[Array, "M E"], rate: float) -> Any:
    """`params` with the routers' biases set to those of `before`, one step of balancing further, whatever the optimizer did."""
    mlp, old = params["layers"]["mlp"], before["layers"]["mlp"]["router_bias"]
    mlp = {**mlp, "router_bias": balanced_bias(old, load, rate)}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}


def make_train_step(config: ExperimentConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state, metrics): loss, grad_norm (before clipping), grad_norm_per_layer [L/2], learning_rate.

    With experts the metrics include `layers.moe.router_health` of the M layers that have them, with an expert_buffer also
    router_dropped, and the step moves their routers' biases by the loads of the batch.  A step whose loss or gradient is not
    finite changes nothing, so that the state left behind stays usable.  The learning_rate is that of this very update.
    """
    tx = optimizer(config.optimizer, config.train.steps, connection_module(config.model.connection))
    rate = schedule(config.optimizer, config.train.steps)
    grad_of = gradients(config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        (loss, router), grads = grad_of(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        per_layer = _square_sums(grads["layers"])
        if "dense_layers" in grads:
            per_layer = jnp.concatenate([_square_sums(grads["dense_layers"]), per_layer])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        health = {}
        if router:
            load, bias = router["expert_load"], router["router_bias"]
            moved = move_router_bias(new.params, state.params, load, config.model.balancing_rate)
            new = TrainState(new.step, moved, new.opt_state)
            health = router_health(load, router["router_entropy"], bias)
            if config.model.expert_buffer:
                health["router_dropped"] = router["router_dropped"]
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        update = state.step
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "grad_norm_per_layer": jnp.sqrt(per_layer),
            "learning_rate": rate(update),
            **health,
        }
        return state, metrics

    return step


def make_unstaged_step(config: ExperimentConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """`make_train_step` without a pipeline, to count its operations: a pipeline has in each tick what any stage may do."""
    return make_train_step(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, stage=1)))


def _square_sums(grads: Any) -> Array:
    """Sum of squares of each layer, [layers]."""
    return functools.reduce(jnp.add, (jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)))


def make_eval_step(config: ExperimentConfig) -> Callable[[Any, Batch], Array]:
    """(params, batch) -> mean loss in nats per token."""
    model = Decoder(config.model)

    def step(params, batch):
        logits, _ = model.apply({"params": params}, batch["inputs"])
        return cross_entropy(logits, batch["targets"])

    return step


def make_diagnostics_step(config: ExperimentConfig) -> Callable[[Any, Int[Array, "B T"]], dict[str, Array]]:
    """(params, tokens) -> what `diagnostics.summarize` wants, from a forward pass of its own: the train step never pays."""
    model = Decoder(config.model)

    def step(params, tokens):
        _, collected = model.apply({"params": params}, tokens, config.train.diagnostics_tokens)
        return dict(collected)

    return step
