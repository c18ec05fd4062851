"""The optimizer AdamW, its learning-rate schedules (WSD among them), and which parameters take weight decay.

Every parameter takes weight decay, the embedding too, except three groups: the weights of norms and the biases of routers
(`NO_DECAY`), and the static parameters of the connection, which the class of each kind lists in `static_params`:

| | no weight decay | weight decay |
| --- | --- | --- |
| HC | A_m, B, A_r, s_a, s_b | W |
| mHC and its family | alpha, bias | phi |
| `gated` | norm | down, up, inject |
| `scalar_gated` | lam, mu | |
| `attnres_block` | | w |
| entry `scaled`, exit `head` | entry_scale, head_alpha, head_bias | head_phi |
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import Connection
from mhc_jax.connections.parameter_paths import CONNECTION, path_of

NO_DECAY = r"(^|/)(\w*norm/weight|router_bias)$"
"""Regular expression that matches the paths of parameters without weight decay, except the static parameters of connections."""


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    r"""Return the function from the index of an update, 0 ... N - 1, to its learning rate, float32 [].  N is `steps`.

    Update $k$ is step $s = k + 1$ of metrics.jsonl.  Steps 1 to W (`warmup_steps`) are the warm-up, in which the rate is $s / W$
    times the peak.  So the rate is never 0, and step W has the peak.  After the warm-up the rate is the peak times a factor:

    - `constant`: 1;
    - `cosine`: $f + (1 - f) (1 + \cos \pi p) / 2$, where $p$ grows from 0 at step max(W, 1) to 1 at step N;
    - `wsd` (warm-up, stable, decay; Hu et al., arXiv 2404.06395): $f + (1 - f) (1 - p)$, where $p$ is 0 until step max(W, N - D)
      and grows to 1 at step N.  The decay is linear and takes a fifth of the run, D = max(N // 5, 1) steps.  The paper leaves the
      form of the decay open;
    - `step`: 1 until 80 % of the N steps, then 0.316, and 0.1 after 90 % (mHC Table 5).

    $f$ is `final_fraction`, and step N of `cosine` and `wsd` has exactly this factor.  In two cases step N has the peak instead: if
    all steps are warm-up (W = N), and if N = 1.

    Examples:
      Warm-up of 2 steps, a stable phase, and a decay over the last 2 of 10 steps.

      >>> config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, final_fraction=0.0)
      >>> print(schedule(config, 10)(jnp.arange(10)))
      [0.5 1.  1.  1.  1.  1.  1.  1.  0.5 0. ]
    """
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_fraction
    begin = max(warmup, 1)
    if config.schedule == "wsd":
        begin = max(begin, steps - max(steps // 5, 1))

    def rate(count):
        step = jnp.asarray(count) + 1
        part = jnp.clip((step - begin) / max(steps - begin, 1), 0.0, 1.0)
        factors = {
            "constant": lambda: 1.0,
            "cosine": lambda: final + (1 - final) * (1 + jnp.cos(jnp.pi * part)) / 2,
            "wsd": lambda: final + (1 - final) * (1 - part),
            "step": lambda: jnp.where(10 * step > 9 * steps, 0.1, jnp.where(10 * step > 8 * steps, 0.316, 1.0)),
        }
        return peak * jnp.where(step <= warmup, step / max(warmup, 1), factors[config.schedule]())

    return rate


def mask(params: Any, pattern: str) -> Any:
    """Return a tree of booleans with the structure of `params`: True where the parameter's path matches `pattern`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: re.search(pattern, path_of(path)) is not None, params)


def no_decay_pattern(connection: type[Connection]) -> str:
    """Return the regular expression that matches the paths of all parameters without weight decay.

    Examples:
      >>> from mhc_jax.connections import connection_module, parse
      >>> pattern = no_decay_pattern(connection_module(parse("mhc")))
      >>> paths = ("layers/mlp/W_up", "final_norm/weight", "layers/mlp_connection/phi", "layers/mlp_connection/bias")
      >>> [path for path in paths if re.search(pattern, path)]
      ['final_norm/weight', 'layers/mlp_connection/bias']
    """
    if not connection.static_params:
        return NO_DECAY
    return f"{NO_DECAY}|{CONNECTION}({'|'.join(connection.static_params)})$"


def optimizer(config: OptimizerConfig, steps: int, connection: type[Connection]) -> optax.GradientTransformation:
    """Return the whole optimizer: clipping of the gradient's global norm, AdamW, and a learning-rate multiplier for connections.

    Parameters that match `no_decay_pattern` take no weight decay.  The weight decay is multiplied by the learning rate, as in
    PyTorch's AdamW.
    """
    no_decay = no_decay_pattern(connection)
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
    """Return a sentence for the log that names the parameters without weight decay, and the parameters of connections."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    no_decay = [p for p in paths if re.search(no_decay_pattern(connection), p)]
    of_connections = [p for p in paths if re.search(CONNECTION, p)]
    return (
        f"{len(paths)} arrays: weight decay {config.weight_decay} on {len(paths) - len(no_decay)}, none on "
        f"{', '.join(no_decay)}; learning rate x{config.connection_lr_multiplier} on {', '.join(of_connections) or 'none'}"
    )
