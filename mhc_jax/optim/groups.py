"""Which rule updates a parameter, and whether the parameter takes weight decay.

Every parameter takes weight decay, the embedding too, except three groups: the weights of norms and the biases of routers
(`NO_DECAY`), and the static parameters of the connection, which the class of each kind lists in `static_params`:

| | no weight decay | weight decay |
| --- | --- | --- |
| HC | A_m, B, A_r, s_a, s_b | W |
| mHC and its family | alpha, bias | phi |
| `identity_mix` | alpha, bias, share_logit | phi |
| `mhc:write_rank=2` and above | also write_alpha, write_bias, write_scale | also write_phi |
| `lanes` | post | |
| `gated` | norm | down, up, inject |
| `scalar_gated` | lam, mu | |
| `attnres_block` | | w |
| `delta_attnres` | g | w |
| `mudd` | bias, gamma | W1, W2 |
| entry `scaled`, exit `head` | entry_scale, head_alpha, head_bias | head_phi |

Under `optimizer.name=muon` Muon updates the matrices that take weight decay, except the embedding and the unembedding, and AdamW
updates everything else.  For mHC this is the division of DeepSeek-V4: AdamW for "the embedding module, the prediction head module,
the static biases and gating factors of mHC modules, and the weights of all RMSNorm modules" (quoted in MaxText#4065), so that Muon
updates phi.  With `optimizer.connections=adamw`, as in PaddleFormers#4532, AdamW updates phi and all else of the connection too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import Connection
from mhc_jax.connections.parameter_paths import CONNECTION, STACKED, path_of

NO_DECAY = r"(^|/)(\w*norm/weight|router_bias)$"
"""Regular expression that matches the paths of parameters without weight decay, except the static parameters of connections."""
VOCABULARY = r"(^|/)(un)?embedding$"
"""Regular expression that matches the paths of the embedding and the unembedding, whose rows or columns are single tokens."""


def decays(connection: type[Connection], path: str) -> bool:
    """Return whether the parameter with this path takes weight decay.

    Examples:
      >>> from mhc_jax.connections import connection_module, parse
      >>> mhc = connection_module(parse("mhc"))
      >>> paths = ("layers/mlp/W_up", "final_norm/weight", "layers/mlp_connection/phi", "layers/mlp_connection/bias")
      >>> [path for path in paths if decays(mhc, path)]
      ['layers/mlp/W_up', 'layers/mlp_connection/phi']
    """
    static = connection.static_params
    without = f"{NO_DECAY}|{CONNECTION}({'|'.join(static)})$" if static else NO_DECAY
    return re.search(without, path) is None


def rule_of(config: OptimizerConfig, connection: type[Connection], path: str, ndim: int) -> str:
    """Return the name of the rule that updates a parameter: `adamw`, or the rule that `config.name` names.

    Args:
      config: settings of the optimizer.
      connection: class of the model's connections.
      path: path of the parameter.
      ndim: number of axes of the parameter, with the axis of stacked blocks.

    Examples:
      >>> from mhc_jax.connections import connection_module, parse
      >>> mhc = connection_module(parse("mhc"))
      >>> axes = {"embedding": 2, "layers/mlp/W_up": 3, "layers/mlp_connection/phi": 3, "layers/mlp_connection/bias": 2}
      >>> [rule_of(OptimizerConfig("muon"), mhc, path, ndim) for path, ndim in axes.items()]
      ['adamw', 'muon', 'muon', 'adamw']
      >>> rule_of(OptimizerConfig("muon", connections="adamw"), mhc, "layers/mlp_connection/phi", 3)
      'adamw'
    """
    if config.connections == "adamw" and re.search(CONNECTION, path):
        return "adamw"
    if config.rule != "muon":
        return config.rule
    is_matrix = ndim - bool(re.search(STACKED, path)) >= 2
    return "muon" if is_matrix and decays(connection, path) and not re.search(VOCABULARY, path) else "adamw"


class Group(NamedTuple):
    """Parameters that one rule updates with one learning rate and one weight decay."""

    rule: str
    """Name of the rule."""
    learning_rate: float
    """Largest learning rate of the schedule, with the multiplier of connections."""
    weight_decay: float
    """Weight decay: an update subtracts weight_decay x learning rate x parameter."""
    parameters: int
    """Number of parameters, counted as numbers."""
    arrays: tuple[str, ...]
    """Paths of the arrays."""


def groups(params: Any, config: OptimizerConfig, connection: type[Connection]) -> list[Group]:
    """List the groups of the arrays in `params` (arrays or their shapes), the one with most parameters first."""
    found: dict[tuple[str, float, float], list[tuple[str, int]]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        multiplier = config.connection_lr_multiplier if re.search(CONNECTION, path) else 1
        decay = config.weight_decay if decays(connection, path) else 0.0
        key = (rule_of(config, connection, path, len(leaf.shape)), config.learning_rate * multiplier, decay)
        found.setdefault(key, []).append((path, leaf.size))
    out = [Group(*key, sum(n for _, n in rows), tuple(path for path, _ in rows)) for key, rows in found.items()]
    return sorted(out, key=lambda group: -group.parameters)


def table(groups: list[Group]) -> list[str]:
    """Return a table for the log, as lines of text: for each group its rule, learning rate, weight decay and arrays."""
    rows = [("updated by", "learning rate", "weight decay", "parameters", "arrays")]
    for group in groups:
        numbers = (f"{group.learning_rate:g}", f"{group.weight_decay:g}", f"{group.parameters:,}")
        folders: dict[str, list[str]] = {}
        for path in group.arrays:
            folder, _, name = path.rpartition("/")
            folders.setdefault(f"{folder}/" if folder else "", []).append(name)
        rows.append((group.rule, *numbers, ", ".join(folder + " ".join(names) for folder, names in folders.items())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def per_parameter(function: Callable[[str, int], Any]) -> Callable[[Any], Any]:
    """Return the function from parameters to the tree of `function(path, number of axes)` of each, as optax's masks need it."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_of(path), leaf.ndim), params
    )
