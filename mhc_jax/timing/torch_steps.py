"""Our side of the comparison with train steps in PyTorch: the same parameters and batches, and the errors between both.

PyTorch's side is `kernels/peer_steps.py`.  It is no part of a package, so functions here take the module as an argument.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import mhc_kernels
import numpy as np

from mhc_jax import connections
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.timing.step_times import BASELINE, LAYERS, LayerShape, config_of, random_batch
from mhc_jax.train_step import gradients, init_state

BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 3e-2)}
"""Largest errors of the loss and of the gradient, as `step_errors` defines them, at which two train steps count as equal.

In bfloat16 two programs round in different places, and the gradients of both are about 1e-2 from those in float32."""


def torch_steps(peer_steps: Any, shape: LayerShape) -> tuple[dict[str, Any], dict[str, str]]:
    """Make PyTorch's train steps of a shape, compiled and run once, by connection; the parameters are those that ours start from.

    Returns:
      the steps, and by connection the message of what failed.

    Raises:
      Exception: whatever the baseline raises, and any error of memory.
    """
    batch = random_batch(config_of(shape, BASELINE, shape.batch_size))
    given = [np.asarray(batch[name]) for name in ("inputs", "targets")]
    steps, errors = {}, {}
    for kind in peer_steps.CONNECTIONS:
        config = config_of(shape, kind, shape.batch_size)
        arrays = _by_path(jax.jit(lambda config=config: init_state(config).params)())
        try:
            model = peer_steps.Model(kind, arrays, shape.batch_size, shape.num_heads, shape.dtype, True)
            steps[_name(kind)] = peer_steps.step_of(model, given)
        except Exception as error:  # one connection that does not compile must not cost the times of the others
            if kind == BASELINE or peer_steps.out_of_memory(error):
                raise
            errors[_name(kind)] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return steps, errors


def step_errors(peer_steps: Any) -> dict[str, dict[str, list[float]]]:
    """Compare losses and gradients of PyTorch's decoder with ours, at the shape `tiny` with two blocks.

    The parameters of connections are moved at random from their initial values, because at those the gradients of many are zero.

    Returns:
      by dtype and connection: the relative error of the loss, and that of the whole gradient in the Euclidean norm.
    """
    out: dict[str, dict[str, list[float]]] = {}
    for dtype in BOUNDS:
        shape = dataclasses.replace(LAYERS["tiny"], num_layers=2, dtype=dtype)
        out[dtype] = {_name(kind): _errors(peer_steps, kind, shape) for kind in peer_steps.CONNECTIONS}
    return out


def equal(errors: dict[str, dict[str, list[float]]]) -> bool:
    """Return whether all errors of `step_errors` are within `BOUNDS`."""
    return all(
        error <= bound
        for dtype, of_kinds in errors.items()
        for pair in of_kinds.values()
        for error, bound in zip(pair, BOUNDS[dtype], strict=True)
    )


def _name(kind: str) -> str:
    return connections.spec(connections.default_config(kind))


def _errors(peer_steps: Any, kind: str, shape: LayerShape) -> list[float]:
    config = config_of(shape, kind, 2)
    batch, keys = random_batch(config), iter(jax.random.split(jax.random.key(1), 100))

    def moved(path: Any, a: Any) -> Any:
        return a + 0.05 * jax.random.normal(next(keys), a.shape) if "connection" in path_of(path) else a

    params = jax.tree_util.tree_map_with_path(moved, init_state(config).params)
    with jax.default_matmul_precision("highest"), mhc_kernels.settings(implementation="xla"):
        (loss, _), tree = jax.jit(gradients(config))(params, batch)
    ours = _by_path(tree)
    model = peer_steps.Model(kind, _by_path(params), 2, shape.num_heads, shape.dtype, False)
    their_loss, theirs = peer_steps.loss_and_gradients(
        model, *(np.asarray(batch[name]) for name in ("inputs", "targets"))
    )
    difference = sum(float(np.sum((theirs[path] - a) ** 2)) for path, a in ours.items())
    size = sum(float(np.sum(a**2)) for a in ours.values())
    return [abs(their_loss - float(loss)) / float(loss), (difference / size) ** 0.5]


def _by_path(params: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by path, float32."""
    return {path_of(path): np.asarray(a, np.float32) for path, a in jax.tree_util.tree_leaves_with_path(params)}
