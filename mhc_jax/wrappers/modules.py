"""`connect`: any kind of connection around a list of Flax blocks, as one Linen or NNX module."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.errors import InputError, require
from mhc_jax.wrappers.wiring import Params, Wiring


class _Wiring(Wiring):
    """`Wiring` whose messages speak of blocks, as `connect` does."""

    names: ClassVar[tuple[str, str]] = ("block", "blocks")


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
        shape: Any = getattr(x, "shape", ())
        require(len(shape) > 0, f"The input is {x!r}; give an array [..., C], channels last.")
        wiring = _Wiring(self.spec, shape[-1], len(self.blocks))

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
        self.wiring = _Wiring(spec, width, len(blocks))
        self.blocks = nnx.List(blocks)
        self.connection = nnx.data(jax.tree.map(nnx.Param, self.wiring.init(rngs.params())))

    def __call__(self, x: Float[Array, "*shape C"], *args: Any, sample: int = 0, **options: Any) -> Any:
        """Return the output of the model; arguments and results are those of `Wiring.apply`."""
        params = jax.tree.map(lambda p: p[...], self.connection, is_leaf=lambda p: isinstance(p, nnx.Variable))
        return self.wiring.apply(params, self.blocks, x, *args, sample=sample, **options)


def _reaches_nnx(block: Any) -> bool:
    """Return whether calling a block uses an NNX module or variable.

    Searched are the objects that its functions name, containers, and of other objects the attributes that these functions name.
    """
    seen, left = {}, [(block.__call__, ())]  # objects, each with the names in the function that uses it
    while left:
        thing, names = left.pop()
        if isinstance(thing, (nnx.Module, nnx.Variable)):
            return True
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, nn.Module)):
            continue
        seen[id(thing)] = thing  # kept, so that no later object has its id
        if isinstance(thing, Mapping):
            used = list(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            used = list(thing)
        elif isinstance(thing, functools.partial):
            used = [thing.func, *thing.args, *thing.keywords.values()]
        else:
            names = getattr(getattr(thing, "__code__", None), "co_names", names)
            known, attributes = getattr(thing, "__globals__", {}), getattr(thing, "__dict__", {})
            used = [found[name] for found in (known, attributes) for name in names if name in found]
            used += [getattr(thing, "__self__", None), getattr(thing, "__wrapped__", None)]
            used += getattr(thing, "__defaults__", None) or ()
            for cell in getattr(thing, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # of a name that is assigned later
                    used.append(cell.cell_contents)
        left += [(one, names) for one in used]
    return False


def _check_block(name: str, block: Any) -> None:
    """Raise `InputError` unless a block is a function of arrays or a Flax module; `name` is what the message calls it."""
    kind = type(block).__name__
    require(
        not isinstance(block, type),
        f"{name} is the class {getattr(block, '__name__', '')}; give an instance of it.",
    )
    require(callable(block), f"{name} is of type {kind}; give functions or Flax modules.")
    if not isinstance(block, nnx.Module):
        require(
            not any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(block)),
            f"{name} is of type {kind} and holds arrays, which would not be trained; use `Wiring`, whose branches are functions of "
            "your own parameters.",
        )
        require(
            not _reaches_nnx(block),
            f"{name} uses an NNX module without being one, so that its parameters would not be trained; give an nnx.Module whose "
            "__call__ does this.",
        )
    arguments: Any = ()
    with contextlib.suppress(TypeError, ValueError):  # of a callable without a signature
        arguments = inspect.signature(block).parameters
    require(
        "sample" not in arguments,
        f"{name} has an argument `sample`, which is the connection's own for diagnostics; give it another name.",
    )


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
      InputError: there is no block, a block is none (see the message), the connection is unknown, or `width` and `rngs` are not
        given for NNX blocks.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> model = connect("mhc:num_streams=4", [jnp.tanh, jnp.sin])
      >>> x = jnp.ones((2, 5, 16))
      >>> params = model.init(jax.random.key(0), x)
      >>> model.apply(params, x).shape
      (2, 5, 16)
    """
    require(
        isinstance(blocks, Sequence) and not isinstance(blocks, str),
        f"blocks is of type {type(blocks).__name__}; give a list of blocks.",
    )
    require(len(blocks) > 0, "blocks is empty; give at least one block.")
    for number, block in enumerate(blocks):
        _check_block(f"blocks[{number}]", block)
    if rngs is None and width is None:
        require(
            not any(isinstance(b, nnx.Module) for b in blocks), "The blocks are NNX modules; give width and rngs too."
        )
        _Wiring(spec, 1, len(blocks))  # refuses an unknown connection now
        return LinenConnected(spec, tuple(blocks))
    if rngs is None or width is None:
        raise InputError("For NNX give both width and rngs; for Linen give neither.")
    require(isinstance(rngs, nnx.Rngs), f"rngs is of type {type(rngs).__name__}; give nnx.Rngs(0).")
    require(
        not any(isinstance(b, nn.Module) for b in blocks),
        "A block is a Linen module; for Linen give no width and no rngs.",
    )
    return NNXConnected(spec, blocks, width, rngs)
