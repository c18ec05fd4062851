"""`connect`: any kind of connection around a list of Flax blocks, as one Linen or NNX module."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.errors import InputError, require
from mhc_jax.wrappers.wiring import Params, Wiring


class LinenConnected(nn.Module):
    """Blocks with a connection around each, as a Flax Linen module.

    The parameters of the connection are in `connection`: `ends`, and `branches_0`, `branches_1`, ... for each block.  Those of the
    blocks are `blocks_0`, `blocks_1`, ..., or where Flax puts blocks that a parent module made.
    """

    spec: str
    """The connection as text, such as `mhc:num_streams=4`."""
    blocks: Sequence[Callable[..., Any]]
    """L Linen modules or functions from [..., C] to the same shape."""

    @nn.compact
    def __call__(self, x: Float[Array, "*shape C"], *args: Any, sample: int = 0, **options: Any) -> Any:
        """Return the output of the model; arguments and results are those of `Wiring.apply`."""
        wiring = Wiring(self.spec, x.shape[-1], len(self.blocks))

        def named(key: Array) -> Params:
            made = wiring.init(key)
            return {"ends": made["ends"]} | {f"branches_{i}": own for i, own in enumerate(made["branches"])}

        if self.is_initializing():
            given: Any = self.param("connection", named)
        else:
            given = self.get_variable("params", "connection", {})
        # All branches that the parameters have, so that `Wiring` can tell if they are too many or too few.
        made = sum(name.startswith("branches_") for name in given) if given else len(self.blocks)
        branches = [given.get(f"branches_{i}", {}) for i in range(made)]
        params = {"ends": given.get("ends", {}), "branches": branches}
        return wiring.apply(params, self.blocks, x, *args, sample=sample, **options)


class NNXConnected(nnx.Module):
    """Blocks with a connection around each, as an NNX module: `blocks` and `connection` hold their `nnx.Param`."""

    def __init__(self, spec: str, blocks: Sequence[Callable[..., Any]], width: int, rngs: nnx.Rngs):
        """Make the parameters of the connection from the stream `params` of `rngs`.

        Args:
          spec: the connection as text, such as `mhc:num_streams=4`.
          blocks: L NNX modules or functions from [..., C] to the same shape.
          width: number C of channels.
          rngs: random numbers.
        """
        self.wiring = Wiring(spec, width, len(blocks))
        self.blocks = nnx.List(blocks)
        self.connection = nnx.data(jax.tree.map(nnx.Param, self.wiring.init(rngs.params())))

    def __call__(self, x: Float[Array, "*shape C"], *args: Any, sample: int = 0, **options: Any) -> Any:
        """Return the output of the model; arguments and results are those of `Wiring.apply`."""
        params = jax.tree.map(lambda p: p[...], self.connection, is_leaf=lambda p: isinstance(p, nnx.Variable))
        return self.wiring.apply(params, self.blocks, x, *args, sample=sample, **options)


def _around(block: Any) -> list[Any]:
    """Return the objects that a function uses: the owner of a method, closure cells, globals, and defaults."""
    if isinstance(block, functools.partial):
        return [block.func, *block.args, *block.keywords.values(), *_around(block.func)]
    used = [getattr(block, "__self__", None), *(getattr(block, "__defaults__", None) or ())]
    for cell in getattr(block, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # of a name that is assigned later
            used.append(cell.cell_contents)
    names, known = getattr(getattr(block, "__code__", None), "co_names", ()), getattr(block, "__globals__", {})
    return used + [known[name] for name in names if name in known]


def connect(
    spec: str, blocks: Sequence[Any], *, width: int | None = None, rngs: nnx.Rngs | None = None
) -> LinenConnected | NNXConnected:
    """Put a connection around each of a list of blocks, in place of x + block(x).

    Each block begins with its own norm and returns what a residual model would add.  The whole maps [..., C] to the same shape, so
    that it stands between embedding and final norm.

    Args:
      spec: the connection as text: a kind of `mhc_jax.connections.KINDS`, and settings, as in `mhc:num_streams=4:init=home`.
      blocks: Flax modules, or functions of arrays.  Attention and feed-forward are two blocks.
      width: number C of channels; only for NNX, whose parameters are made at once.
      rngs: random numbers; only for NNX.

    Returns:
      a Linen module, or with `rngs` an NNX module.

    Raises:
      InputError: there is no block, the connection is unknown, or `width` and `rngs` are not given for NNX blocks.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = connect("mhc:num_streams=4", [jnp.tanh, jnp.sin])
      >>> x = jnp.ones((2, 5, 16))
      >>> params = model.init(jax.random.key(0), x)
      >>> model.apply(params, x).shape
      (2, 5, 16)
    """
    require(len(blocks) > 0, "blocks is empty; give at least one block.")
    for block in blocks:
        require(
            callable(block), f"A block is an object of type {type(block).__name__}; give functions or Flax modules."
        )
        require(
            isinstance(block, nnx.Module) or not any(isinstance(a, nnx.Module) for a in _around(block)),
            "A block is a method of an NNX module, or a function around one, whose parameters may then be constants; give an "
            "nnx.Module whose __call__ does this.",
        )
    if rngs is None and width is None:
        require(
            not any(isinstance(b, nnx.Module) for b in blocks), "The blocks are NNX modules; give width and rngs too."
        )
        Wiring(spec, 1, len(blocks))  # refuses an unknown connection now
        return LinenConnected(spec, tuple(blocks))
    if rngs is None or width is None:
        raise InputError("For NNX give both width and rngs; for Linen give neither.")
    require(
        not any(isinstance(b, nn.Module) for b in blocks),
        "A block is a Linen module; for Linen give no width and no rngs.",
    )
    return NNXConnected(spec, blocks, width, rngs)
