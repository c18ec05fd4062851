"""The whole optimizer: clipping, the rule that makes a direction of the gradient, weight decay, and the learning rate."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mhc_jax import user_functions
from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import Connection
from mhc_jax.connections.parameter_paths import CONNECTION, path_of
from mhc_jax.errors import require
from mhc_jax.optim.groups import decays, per_parameter, rule_of
from mhc_jax.optim.learning_rate import schedule
from mhc_jax.parallel.sharding import on_whole_matrices

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""Coefficients of the ten Newton-Schulz iterations of Muon in DeepSeek-V4 (Algorithm 1).  The first eight bring singular values
near 1, and the last two to 1."""
PROBE = {"weight": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)}
"""Parameters and a gradient of them, with which a transformation of the user's is tried."""


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

    $u = \rho \sqrt{\max(a, b)}\; \mathrm{NewtonSchulz}(\mathrm{momentum}(g))$

    Newton-Schulz replaces the singular values of a matrix [a, b] by numbers near 1 (`NEWTON_SCHULZ`).  The entries of the result
    have a root mean square of $1 / \sqrt{\max(a, b)}$, so that those of u have $\rho$, whatever the shape (Moonlight, arXiv
    2502.16982).  A learning rate for AdamW then serves Muon too.

    The last two axes of an array are one matrix, and every other axis counts matrices: blocks, and experts.  The heads of attention
    and the columns of phi for pre, post and res are orthogonalised together, as parts of the matrix in which the model keeps them.
    optax's scale_by_muon orthogonalises matrices that are spread over the devices of the mesh (`on_whole_matrices`).

    Args:
      momentum: the decay $\beta$ of the running mean of gradients (`nesterov`).
      rms: the root mean square $\rho$ of the entries of u.
    """
    coefficients: Any = NEWTON_SCHULZ
    orthogonal = scale_by_muon(
        coefficients,
        len(NEWTON_SCHULZ),
        beta=0.0,
        eps=1e-20,
        nesterov=False,
        weight_dimension_numbers=MuonDimensionNumbers(-2, -1),
    )

    def direction(u: Array) -> Array:
        orthogonalized: Any = orthogonal.update(u, orthogonal.init(u))[0]
        return rms * math.sqrt(max(u.shape[-2:])) * orthogonalized

    def directions(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, u: on_whole_matrices(direction, path_of(path), u), updates)

    return optax.chain(nesterov(momentum), optax.stateless(directions))


def nesterov(decay: float) -> optax.GradientTransformation:
    r"""Return the momentum of optax's Muon, Nesterov's, from optax's running mean `ema`.

    $m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
    u_t = \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t}$

    Deviation: DeepSeek-V4 has no divisors.  Orthogonalised directions then differ by some percent in the first ten updates, and by
    0.2 % in the fortieth, at $\beta = 0.95$.

    Args:
      decay: the decay $\beta$.
    """
    mean = optax.ema(decay, debias=False)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mean_g, state = mean.update(updates, state)
        t = state.count
        weigh = lambda m, g: decay * m / (1 - decay ** (t + 1)) + (1 - decay) * g / (1 - decay**t)  # noqa: E731
        return jax.tree.map(weigh, mean_g, updates), state

    return optax.GradientTransformation(mean.init, update)


def _of_the_user(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the transformation that a function of the user's makes of the settings of the optimizer.

    An exception in its `init` or `update` becomes an `InputError`.
    """
    name = config.name
    made = user_functions.load("optimizer.name", name, "config", "the settings `config.optimizer`")(config)
    require(
        isinstance(made, optax.GradientTransformation),
        f"optimizer.name {name!r} returns a {type(made).__name__}; it must return a transformation of optax, such as "
        "`optax.contrib.scale_by_ademamix()`, that makes a direction of a gradient.",
    )
    init, update = (user_functions.guarded("optimizer.name", name, function) for function in (made.init, made.update))
    try:
        with jax.ensure_compile_time_eval():
            u = made.update(PROBE, made.init(PROBE), PROBE)[0]["weight"]
            along = float(jnp.vdot(u, PROBE["weight"]))
    except Exception:  # It may need the names or the shapes of a model, and its errors then tell more.
        along = 0.0
    require(
        along >= 0,
        f"optimizer.name {name!r} returns an optimizer with a learning rate of its own: its direction points against the gradient. "
        "Return a direction along the gradient, such as `optax.scale_by_adam()` for `optax.adam(1e-3)`.",
    )
    return optax.GradientTransformation(init, update)
