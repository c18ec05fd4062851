"""The whole optimizer: clipping, the rule that makes a direction of the gradient, weight decay, and the learning rate."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mhc_jax import user_functions
from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import Connection
from mhc_jax.connections.parameter_paths import CONNECTION, path_of
from mhc_jax.errors import InputError
from mhc_jax.optim.groups import decays, per_parameter, rule_of
from mhc_jax.optim.learning_rate import schedule
from mhc_jax.parallel.sharding import on_whole_matrices

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""Coefficients of the ten Newton-Schulz iterations of Muon in DeepSeek-V4 (Algorithm 1).  The first eight bring singular values
near 1, and the last two to 1."""


def optimizer(config: OptimizerConfig, steps: int, connection: type[Connection]) -> optax.GradientTransformation:
    r"""Return the whole optimizer, a chain of optax's transformations.

    1. The gradient is clipped to the global norm `grad_clip`.
    2. A rule makes a direction u of it.  `adamw`: optax's scale_by_adam.  `lion`: scale_by_lion.  `sgd`: the momentum
       $m \leftarrow b_1 m + g$.  `muon`: see `muon`, with AdamW for some groups (`groups.rule_of`).  A function of the user's makes
       any other (`docs/optimizers.md`).
    3. The weight decay $\lambda$ times the parameter is added to the direction, where the parameter takes weight decay.
    4. The update is $-\eta\, (u + \lambda \theta)$ with the learning rate $\eta$ of `schedule`.  Updates of connections are
       multiplied by `connection_lr_multiplier`.

    Weight decay is thus decoupled from the gradient and multiplied by the learning rate under every rule, as in PyTorch's AdamW.

    Args:
      config: settings of the optimizer.
      steps: number of steps of the whole run.
      connection: class of the model's connections.

    Raises:
      InputError: `config.name` names a function that does not exist, fails, or does not return a transformation.
    """
    transforms = [
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else None,
        _direction(config, connection),
        optax.add_decayed_weights(config.weight_decay, mask=per_parameter(lambda path, _: decays(connection, path))),
        optax.scale_by_learning_rate(schedule(config, steps)),
    ]
    if config.connection_lr_multiplier != 1:
        of_connections = per_parameter(lambda path, _: re.search(CONNECTION, path) is not None)
        transforms.append(optax.masked(optax.scale(config.connection_lr_multiplier), of_connections))
    return optax.chain(*(transform for transform in transforms if transform is not None))


def _direction(config: OptimizerConfig, connection: type[Connection]) -> optax.GradientTransformation:
    """Return the transformation of a gradient into a direction, which has different rules for different groups if need be."""
    adamw = optax.scale_by_adam(config.b1, config.b2, config.eps)
    rules = {
        "adamw": lambda: adamw,
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "sgd": lambda: optax.trace(config.b1),
        "muon": lambda: muon(config.muon.momentum, config.muon.rms),
    }
    rule = rules.get(config.rule, lambda: _of_the_user(config))()
    if config.rule == "adamw" or (config.rule != "muon" and config.connections != "adamw"):
        return rule
    labels = per_parameter(lambda path, ndim: rule_of(config, connection, path, ndim))
    return optax.partition({config.rule: rule, "adamw": adamw}, labels)


def muon(momentum: float, rms: float) -> optax.GradientTransformation:
    r"""Return Muon's direction of matrices as in DeepSeek-V4 (section 2.4): momentum, orthogonalised, of a fixed root mean square.

    $m \leftarrow \beta m + (1 - \beta) g, \qquad u = \rho \sqrt{\max(a, b)}\; \mathrm{NewtonSchulz}(\beta m + (1 - \beta) g)$

    Newton-Schulz replaces the singular values of a matrix [a, b] by numbers near 1 (`NEWTON_SCHULZ`).  The entries of the result
    have a root mean square of $1 / \sqrt{\max(a, b)}$, so that those of u have $\rho$, whatever the shape (Moonlight, arXiv
    2502.16982).  A learning rate for AdamW then serves Muon too.

    The last two axes of an array are one matrix, and every other axis counts matrices: blocks, and experts.  The heads of attention
    and the columns of phi for pre, post and res are orthogonalised together, as parts of the matrix in which the model keeps them.

    optax's scale_by_muon does the work, in two parts.  The first has no iterations, and returns the momentum divided by its
    Frobenius norm.  The second has no momentum, and orthogonalises matrices that are spread over the devices of the mesh
    (`on_whole_matrices`).

    Args:
      momentum: the decay $\beta$ of the running mean of gradients.
      rms: the root mean square $\rho$ of the entries of u.
    """

    def matrices(updates: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)

    coefficients: Any = NEWTON_SCHULZ
    options: Any = {"eps": 1e-20, "weight_dimension_numbers": matrices}
    normalized_momentum = scale_by_muon(ns_steps=0, beta=momentum, **options)
    orthogonal = scale_by_muon(coefficients, len(coefficients), beta=0.0, nesterov=False, **options)

    def direction(u: Array) -> Array:
        orthogonalized: Any = orthogonal.update(u, orthogonal.init(u))[0]
        return rms * math.sqrt(max(u.shape[-2:])) * orthogonalized

    def directions(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, u: on_whole_matrices(direction, path_of(path), u), updates)

    return optax.chain(normalized_momentum, optax.stateless(directions))


def _of_the_user(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the transformation that a function of the user's makes of the settings of the optimizer."""
    made = user_functions.load("optimizer.name", config.name, "config", "the settings `config.optimizer`")(config)
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(
            f"optimizer.name {config.name!r} returns a {type(made).__name__}; it must return a transformation of optax, such as "
            "`optax.contrib.scale_by_ademamix()`, that makes a direction of a gradient."
        )
    return made
