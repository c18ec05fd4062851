"""AdamW, its schedules, and the masks that tell connection parameters and static parameters apart."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import Connection
from mhc_jax.paths import CONNECTION, path_of

NO_DECAY = r"(^|/)(\w*norm/weight|router_bias)$"
"""Parameters outside connections that take no weight decay; a router's bias is moved by the train step alone."""


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of optimizer step 0 ... steps - 1: linear warm-up to the peak, then the decay.

    `step` is mHC Table 5: x0.316 at 80 % and x0.1 at 90 % of training.  `wsd` (Hu et al., arXiv 2404.06395) stays at
    the peak and decays linearly over the last 20 %.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    after = max(steps - warmup, 1)

    def steps_down(step):
        tenths = 10 * (step + warmup)
        return peak * jnp.where(tenths >= 9 * steps, 0.1, jnp.where(tenths >= 8 * steps, 0.316, 1.0))

    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction),
        "step": lambda: steps_down,
        "wsd": lambda: optax.linear_schedule(
            peak,
            peak * config.final_fraction,
            transition_steps=max(int(0.2 * steps), 1),
            transition_begin=max(int(0.8 * steps) - warmup, 0),
        ),
    }
    decay = decays[config.schedule]()
    if not warmup:
        return decay
    # The first step already moves: step 0 runs at peak / warmup, step warmup - 1 at the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def mask(params: Any, pattern: str) -> Any:
    """Tree of booleans: does the parameter's path match the regular expression?"""
    return jax.tree_util.tree_map_with_path(lambda path, _: re.search(pattern, path_of(path)) is not None, params)


def no_decay_pattern(config: OptimizerConfig, connection: type[Connection]) -> str:
    """Regular expression of the parameters without weight decay: norms, and the static parameters of the connection."""
    if config.decay_static or not connection.static_params:
        return NO_DECAY
    return f"{NO_DECAY}|{CONNECTION}({'|'.join(connection.static_params)})$"


def optimizer(config: OptimizerConfig, steps: int, connection: type[Connection]) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, decay on all but `no_decay_pattern`, learning-rate multiplier for connections."""
    no_decay = no_decay_pattern(config, connection)
    transforms = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree.map(lambda m: not m, mask(params, no_decay))
        ),
        optax.scale_by_learning_rate(schedule(config, steps)),
    ]
    if config.grad_clip:
        transforms.insert(0, optax.clip_by_global_norm(config.grad_clip))
    if config.connection_lr_multiplier != 1:
        transforms.append(
            optax.masked(optax.scale(config.connection_lr_multiplier), lambda params: mask(params, CONNECTION))
        )
    return optax.chain(*transforms)


def describe(params: Any, config: OptimizerConfig, connection: type[Connection]) -> str:
    """What the masks matched, for the log."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    no_decay = [p for p in paths if re.search(no_decay_pattern(config, connection), p)]
    own = [p for p in paths if re.search(CONNECTION, p)]
    return (
        f"{len(paths)} arrays: weight decay {config.weight_decay} on {len(paths) - len(no_decay)}, none on "
        f"{', '.join(no_decay)}; learning rate x{config.connection_lr_multiplier} on {', '.join(own) or 'none'}"
    )
