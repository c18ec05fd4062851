"""The train step, the validation step and the diagnostics step, as pure functions of the state or the parameters and a batch."""

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
from mhc_kernels import backend_choice

from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import connection_module
from mhc_jax.diagnostics import DIAGNOSTICS_TOKENS
from mhc_jax.layers.moe import BALANCING_RATE, balanced_bias, router_health
from mhc_jax.model import Decoder
from mhc_jax.optim import optimizer, schedule
from mhc_jax.parallel.sharding import constrain, gathered, stored
from mhc_jax.pipeline.executor import pipelined, schedule_of

Batch = dict[str, Int[Array, "B T"]]
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
"""XLA's options for a train step on a TPU.

One operation of XLA may take 32 MiB of VMEM, which is half of a v5p's, instead of 16 MiB.  Matrix products then have larger tiles,
and read their operands from HBM fewer times.
"""


@flax.struct.dataclass
class TrainState:
    """The train state, which a checkpoint holds.  Its leaves are arrays, or the shapes and dtypes of arrays."""

    step: Any
    """Number of optimizer updates that are done, int32 []."""
    params: Any
    """Parameters of the decoder, float32."""
    opt_state: Any
    """State of the optimizer that `optim.optimizer` makes."""


def init_state(config: ExperimentConfig) -> TrainState:
    """Make the initial train state, with random numbers from train.seed.

    The parameters of branches get the same values with every connection, because a random key depends on the parameter's path.
    """
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Decoder(config.model).init(jax.random.key(config.train.seed), tokens)["params"]
    tx = optimizer(config.optimizer, config.train.steps, connection_module(config.model.connection))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def gradients(config: ExperimentConfig) -> Callable[[Any, Batch], tuple[tuple[Array, dict[str, Array]], Any]]:
    """Return the function (params, batch) -> ((loss, router), gradient).

    Loss, router and gradient are means over optimizer.accumulation_steps slices of the batch.  If mesh.stage is above 1, the slices
    are the microbatches of a pipeline.  `router` holds the auxiliary values of routers (see `Decoder`), and is {} without experts.
    """
    if config.model.remat_policy == "auto":
        raise ValueError("model.remat is 'auto'; give the configuration that `remat_plan.resolve` returns.")
    A = config.optimizer.accumulation_steps
    if (table := schedule_of(config)) is not None:
        run = pipelined(config, table)
        return lambda params, batch: _stored_gradient(*run(gathered(params, None), batch))
    model = Decoder(config.model)

    def loss_of(params, batch):
        return model.apply({"params": params}, batch["inputs"], targets=batch["targets"])

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def one_slice(params, piece):
        """Return the value and the gradient, float32 and sharded as it is stored, for parameters that are `gathered`."""
        return _stored_gradient(*value_and_grad(params, piece))

    def accumulated(params, batch):
        params = gathered(params, config.model.compute_dtype)
        if A == 1:
            return one_slice(params, batch)
        slices = jax.tree.map(lambda a: a.reshape(A, a.shape[0] // A, *a.shape[1:]), batch)
        slices = jax.tree.map(lambda a: constrain(a, None, "batch", "sequence"), slices)

        def add(total, piece):
            return jax.tree.map(jnp.add, total, one_slice(params, piece)), None

        shapes = jax.eval_shape(one_slice, params, jax.tree.map(lambda a: a[0], slices))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        zero = _stored_gradient(*zero)
        total, _ = jax.lax.scan(add, zero, slices)
        return jax.tree.map(lambda a: a / A, total)

    return accumulated


def _stored_gradient(value: Any, gradient: Any) -> tuple[Any, Any]:
    """Return the pair (value, gradient) with the gradient in float32 and sharded as parameters are stored (`sharding.stored`)."""
    return value, jax.tree.map(lambda g: g.astype(jnp.float32), stored(gradient))


def move_router_bias(params: Any, before: Any, load: Float[Array, "M E"], rate: float) -> Any:
    """Return `params` with the routers' biases replaced by those of `before`, moved by one step of balancing (`balanced_bias`).

    `before` and `params` are the parameters before and after the optimizer's update.  `load` counts the tokens of each expert.
    """
    bias = balanced_bias(before["layers"]["mlp"]["router_bias"], load, rate)
    layers = params["layers"]
    return {**params, "layers": {**layers, "mlp": {**layers["mlp"], "router_bias": bias}}}


def make_train_step(config: ExperimentConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return the function (state, batch) -> (state, metrics) of one optimizer step.

    Metrics are loss, grad_norm (before clipping), grad_norm_per_layer [L/2] (of each block) and learning_rate (of this update).
    If the model has experts, metrics also have the numbers of `layers.moe.router_health`, and router_dropped if model.experts sets
    a buffer.  The step then also moves the routers' biases, by the loads of experts in the batch (`move_router_bias`).

    A step whose loss or gradient is not finite returns the state unchanged, so that the last finite state can be saved.
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
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "grad_norm_per_layer": jnp.sqrt(per_layer),
            "learning_rate": rate(state.step),
        }
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if router:
            load = router["expert_load"]
            params = move_router_bias(params, state.params, load, BALANCING_RATE)
            metrics |= router_health(load, router["router_entropy"], router["router_bias"])
            if config.model.expert_buffer:
                metrics["router_dropped"] = router["router_dropped"]
        new = TrainState(state.step + 1, params, opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

    return step


def compiler_options() -> dict[str, str] | None:
    """Return the options with which `jax.jit` compiles a train step: `TPU_OPTIONS`, or None if the platform is no TPU.

    The platform is that of `mhc_kernels.settings`.
    """
    return TPU_OPTIONS if backend_choice.platform() == "tpu" else None


def make_unstaged_step(config: ExperimentConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return the train step (`make_train_step`) of the same model without a pipeline, for counting its FLOPs.

    A count of the step with a pipeline would be wrong, because each tick of its program contains the operations of every stage.
    """
    return make_train_step(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, stage=1)))


def _square_sums(grads: Any) -> Array:
    """Return the sum of squared gradients of each block, as an array [blocks].  The arrays of `grads` are [blocks, ...]."""
    return functools.reduce(jnp.add, (jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)))


def make_eval_step(config: ExperimentConfig) -> Callable[[Any, Batch], Array]:
    """Return the function (params, batch) -> mean loss in nats per token, for validation."""
    model = Decoder(config.model)

    def step(params, batch):
        params = gathered(params, config.model.compute_dtype)
        loss, _ = model.apply({"params": params}, batch["inputs"], targets=batch["targets"])
        return loss

    return step


def make_diagnostics_step(
    config: ExperimentConfig, sample: int = DIAGNOSTICS_TOKENS
) -> Callable[[Any, Int[Array, "B T"]], dict[str, Array]]:
    """Return the function (params, tokens) -> arrays for `diagnostics.summarize`, collected at `sample` tokens.

    The function is a forward pass of its own, so that diagnostics cost nothing in the train step.
    """
    model = Decoder(config.model)

    def step(params, tokens):
        _, collected = model.apply({"params": gathered(params, config.model.compute_dtype)}, tokens, sample)
        return dict(collected)

    return step
