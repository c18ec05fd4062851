"""Train steps on a mesh of simulated devices, and the same steps on one device to compare them with."""

import dataclasses
import functools
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from support.tolerances import (
    AMPLIFIED,
    ANOTHER_PROGRAM,
    FP32_RELATIVE,
    REORDERED,
    WHOLE_GRADIENT,
    assert_close,
    cancelling,
)

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.parallel.sharding import batch_sharding, make_mesh, state_shardings, using
from mhc_jax.train_step import gradients, init_state, make_train_step

B, T, V = 8, 32, 56
EXPERTS = {"experts": "4:active=2:shared=1:width=12:dense_layers=0"}
"""An expert_width of 12 keeps the experts' weights from having the shape of the tokens.

With equal shapes XLA may give the weights the sharding of the tokens inside a branch of a conditional.  That takes a collective
of all devices in a branch that only some of them run, and XLA's CPU backend hangs.
"""


def name_of(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items()) if isinstance(mesh, dict) else mesh


def tiny(kind, mesh=None, accumulation_steps=1, size=(B, T), pipeline=None, **model) -> ExperimentConfig:
    settings = {"vocab_size": V, "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48}
    return ExperimentConfig(
        model=ModelConfig(**settings | {"connection": connections.parse(kind)} | model),
        data=DataConfig(sequence_length=size[1], batch_size=size[0]),
        optimizer=OptimizerConfig(accumulation_steps=accumulation_steps),
        mesh=MeshConfig(**mesh or {}),
        pipeline=pipeline or PipelineConfig(),
    )


def batch(config, seed=0):
    """Random tokens of the configuration's shape."""
    r, shape = np.random.default_rng(seed), (config.data.batch_size, config.data.sequence_length)
    return {key: r.integers(0, config.model.vocab_size, shape).astype(np.int32) for key in ("inputs", "targets")}


def shapes(config):
    return jax.eval_shape(lambda: init_state(config).params)


def random_params(config):
    """Random parameters, the same for every mesh.  At the initial values many gradients are zero."""
    r = np.random.default_rng(1)
    return jax.tree.map(lambda a: np.float32(0.3 * r.normal(size=a.shape)), shapes(config))


@functools.cache
def lowered_gradients(config):
    """(traced program, lowered program, shardings of parameters and of a batch, or None without a mesh)."""
    mesh, examples = make_mesh(config.mesh), (shapes(config), batch(config))
    with using(mesh):
        inputs = (state_shardings(mesh, examples[0]), batch_sharding(mesh)) if mesh else None
        results = (NamedSharding(mesh, PartitionSpec()), inputs[0]) if mesh else None
        traced = jax.jit(gradients(config), in_shardings=inputs, out_shardings=results).trace(*examples)
        return traced, traced.lower(), inputs


@functools.cache
def compiled_gradients(config):
    return lowered_gradients(config)[1].compile()


def run_gradients(config):
    """(loss, values that routers report, gradients by path)."""
    arguments = jax.device_put((random_params(config), batch(config)), lowered_gradients(config)[2])
    (loss, router), grads = compiled_gradients(config)(*arguments)
    by_path = {path_of(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    return float(loss), jax.device_get(router), by_path


def alone(config):
    return dataclasses.replace(config, mesh=MeshConfig(), pipeline=PipelineConfig())


@functools.cache
def on_one_device(config):
    return run_gradients(alone(config))


def collectives(compiled):
    """(kind, type and shape of the result) of every collective of a compiled program."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    pattern = rf"= (\S+|\(.*?\)) ({kinds})(?:-start)?\("
    return [(kind, shape) for shape, kind in re.findall(pattern, compiled.as_text())]


def trained(config, steps):
    """(metrics of each step, biases of the routers at the end)."""
    mesh, collected = make_mesh(config.mesh), []
    state = jax.jit(lambda: init_state(config))()
    shardings, rows = (state_shardings(mesh, state), batch_sharding(mesh)) if mesh else (None, None)
    state = jax.device_put(state, shardings)
    with using(mesh):
        step = jax.jit(make_train_step(config), out_shardings=shardings and (shardings, None))
        for seed in range(steps):
            state, metrics = step(state, jax.device_put(batch(config, seed % 5), rows))
            collected.append(jax.device_get(metrics))
    return collected, np.asarray(state.params["layers"]["mlp"]["router_bias"])


def assert_same_step(config):
    """The loss, its gradients and the values of routers are those of one device without a pipeline."""
    (loss, router, grads), (expected_loss, expected_router, expected) = run_gradients(config), on_one_device(config)
    assert_close(loss, expected_loss, FP32_RELATIVE, "loss")
    assert grads.keys() == expected.keys()
    # identity_mix has logits whose gradient is one sum over all tokens and channels; 1.06e-5 was seen.
    kinds = {"hc": AMPLIFIED, "identity_mix": WHOLE_GRADIENT}
    relative = kinds.get(config.model.connection.kind, ANOTHER_PROGRAM)
    terms = cancelling(expected)
    for path, g in expected.items():
        assert_close(grads[path], g, relative, f"gradient of {path}", terms[path])
    assert router.keys() == expected_router.keys()
    for name, value in expected_router.items():
        assert_close(router[name], value, REORDERED, name)
