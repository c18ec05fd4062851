"""A connection around any list of branches, as pure functions of parameters: the form for bare JAX, Equinox and own loops.

A branch is a function from an array [..., C] to an array of the same shape, with its own norm inside, such as attention or a
feed-forward.  Where a model adds the output of branch l to its input, x + F_l(x), `Wiring` puts any kind of connection instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections import Connection, connection_module, parse
from mhc_jax.diagnostics import sample_sublayer
from mhc_jax.errors import InputError, require

Branch = Callable[..., Any]
Params = dict[str, Any]


class State(NamedTuple):
    """What travels from one branch to the next."""

    streams: Any
    """The streams of the connection, a pytree of arrays whose leading axes are [B, T]."""
    coefficients: Any
    """The coefficients with which `y` will be written to the streams."""
    y: Float[Array, "B T C"]
    """Output of the last branch, which the next boundary writes to the streams."""
    branch: Any = 0
    """Number of branches that have been read, an integer or a traced one; the next branch is this one, counted from 0."""


@dataclass(frozen=True)
class Wiring:
    """The connection of a model with `num_branches` branches of `width` channels; it holds no arrays.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> wiring = Wiring("mhc:num_streams=2", width=16, num_branches=2)
      >>> params, x = wiring.init(jax.random.key(0)), jnp.ones((3, 5, 16))
      >>> wiring.apply(params, [jnp.tanh, jnp.sin], x).shape
      (3, 5, 16)
    """

    names: ClassVar[tuple[str, str]] = ("branch", "branches")
    """How error messages name one branch, and several."""

    spec: str
    """The connection as text, `kind` or `kind:setting=value:...`, such as `mhc:num_streams=4`."""
    width: int
    """Number C of channels, the last axis of every array."""
    num_branches: int
    """Number L of branches.  Attention and feed-forward count as two."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.spec, str),
            f"The connection is of type {type(self.spec).__name__}; give a text such as 'mhc:num_streams=4'.",
        )
        parse(self.spec)
        for name in ("width", "num_branches"):
            value = getattr(self, name)
            require(
                isinstance(value, Integral) and int(value) >= 1,
                f"{name} is {value!r}; it must be a whole number of at least 1.",
            )

    def module(self, branch: int | Array | None, **options: Any) -> Connection:
        """Make the Flax Linen module of a branch, counted from 0, or that of entry and exit (`None`)."""
        config = parse(self.spec)
        return connection_module(config)(config, self.width, self.num_branches, branch, **options)

    def init(self, key: Array, stacked: bool = False) -> Params:
        """Make the parameters of the connection, float32.

        Args:
          key: random key.
          stacked: whether the parameters of all branches are stacked along a leading axis [L, ...], for a scan over depth.

        Returns:
          `ends` (entry and exit) and `branches`, a list with one dict for each branch, or one dict of stacked arrays.
        """
        x, ends = jnp.zeros((1, 1, self.width)), self.module(None)
        state: Any = jax.eval_shape(lambda: ends.init_with_output(key, x, method="start")[0])
        keys = jax.random.split(key, self.num_branches)

        def of_branch(index: Any, key: Array) -> Params:
            streams, c = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
            made: Any = self.module(index).init(key, streams, c, x, method="write_read")
            return made.get("params", {})

        if stacked:
            branches: Any = jax.vmap(of_branch)(jnp.arange(self.num_branches), keys)
        else:
            branches = [of_branch(index, k) for index, k in enumerate(keys)]
        of_ends: Any = ends.init(key, x, method="start")
        made = {"ends": of_ends.get("params", {}), "branches": branches}
        return jax.tree.map(lambda a: a.astype(jnp.float32), made)

    def start(self, params: Params, x: Float[Array, "B T C"]) -> State:
        """Make the state before the first branch from the input of the model.

        Raises:
          InputError: the parameters of entry and exit are those of another connection.
        """
        ends = _part(params, "ends")
        self._check(ends, _shapes(self)[0], "entry and exit")
        made: Any = self.module(None).apply({"params": ends}, x, method="start")
        streams, c = made
        return State(streams, c, jnp.zeros_like(x))

    def boundary(self, branch_params: Params, state: State) -> tuple[State, Float[Array, "B T C"]]:
        """Write the output of the last branch to the streams, and read the input of the next branch.

        Args:
          branch_params: parameters of the connection at the next branch: an entry of `branches`, or a slice of the stack.
          state: the state with the output of the last branch.

        Returns:
          the state, to which `put` adds the output of the next branch, and the input of that branch.

        Raises:
          InputError: the parameters are those of another connection.  Kinds whose parameters have the same names and shapes, such
            as `mhc` and `single_pass`, cannot be told apart.
        """
        self._check(branch_params, _shapes(self)[1], f"a {self.names[0]}")
        link = self.module(state.branch)
        made: Any = link.apply({"params": branch_params}, *state[:3], method="write_read")
        streams, c, h = made
        return State(streams, c, state.y, state.branch + 1), h

    def put(self, state: State, y: Any) -> State:
        """Return the state with the output y of the branch whose input was just read, in the dtype of the streams' input.

        Raises:
          InputError: y is no floating-point array of the shape of that input.
        """
        _check_output(f"A {self.names[0]}", y, state.y.shape)
        return state._replace(y=y.astype(state.y.dtype))

    def finish(self, params: Params, state: State) -> Float[Array, "B T C"]:
        """Write the output of the last branch, and return the output of the model: one vector made of the streams."""
        ends, given = self.module(None), {"params": _part(params, "ends")}
        streams = ends.apply(given, *state[:3], method="write")
        out: Any = ends.apply(given, streams, state.coefficients, method="collapse")
        return out

    def apply(
        self,
        params: Params,
        branches: Sequence[Branch],
        x: Float[Array, "*shape C"],
        /,
        *args: Any,
        sample: int = 0,
        **options: Any,
    ) -> Any:
        """Return the output of the model for the input x.

        Args:
          params: what `init` made.
          branches: L functions; branch l gets an array of the shape of x, `args` and `options`.
          x: input, channels last, of any rank: [C], [T, C], [B, T, C], [B, H, W, C].
          args, options: further arguments of every branch, such as a mask.
          sample: number of tokens from which diagnostics are collected; 0: none.

        Returns:
          an array of the shape of x.  With `sample`, that and a dict of arrays [L, ...], which `mhc_jax.diagnostics.summarize`
          turns into gains and measures of streams.

        Raises:
          InputError: the input is no floating-point array [..., C] or is empty, the number of branches is another one, the
            parameters are those of another connection, a branch returns something else, or `sample` is no number of tokens.
        """
        require(
            isinstance(sample, Integral) and not isinstance(sample, bool) and sample >= 0,
            f"sample is {sample!r}; it is the number of tokens for diagnostics, a whole number of at least 0. An argument of a "
            f"{self.names[0]} needs another name.",
        )
        tokens, listed = self.flat(x, len(branches)), self.parameters_of_branches(params)
        state, collected = self.start(params, tokens), []
        for number, (branch, own) in enumerate(zip(branches, listed, strict=True)):
            state, h = self.boundary(own, state)
            y = branch(h.reshape(x.shape), *args, **options)
            _check_output(f"{self.names[1]}[{number}]", y, x.shape)
            state = self.put(state, y.reshape(h.shape))
            if sample:
                collected.append(self.module(number).apply({"params": own}, *state[:3], sample, method=sample_sublayer))
        out = self.finish(params, state).reshape(x.shape)
        return (out, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)) if sample else out

    def parameters_of_branches(self, params: Params) -> list[Params]:
        """Return the parameters of the connection at each branch, from a list of dicts or from one dict of stacked arrays.

        Raises:
          InputError: they are those of another number of branches.
        """
        given = _part(params, "branches")
        if isinstance(given, (list, tuple)):
            found = len(given)
        else:
            sizes = {a.shape[0] for a in jax.tree.leaves(given)} or {self.num_branches}
            found = sizes.pop() if len(sizes) == 1 else 0
            given = [jax.tree.map(lambda a, i=i: a[i], given) for i in range(found)]
        require(
            found == self.num_branches,
            f"The parameters are those of {found} {self.names[1]}, not of {self.num_branches}; `init` makes them.",
        )
        return list(given)

    def flat(self, x: Float[Array, "*shape C"], branches: int) -> Float[Array, "B T C"]:
        """Return the input as [B, T, C], after checks of its dtype and shape and of the number of branches."""
        many = self.names[1]
        require(
            branches == self.num_branches, f"There are {branches} {many}, not {self.num_branches} as in the wiring."
        )
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if shape is None or dtype is None:
            raise InputError(f"The input is of type {type(x).__name__}; give an array of shape [..., {self.width}].")
        require(
            jnp.issubdtype(dtype, jnp.floating),
            f"The input has the dtype {dtype}; give floating-point channels, such as an embedding of tokens.",
        )
        require(shape[-1:] == (self.width,), f"The input has the shape {shape}; its last axis must be {self.width}.")
        require(0 not in shape, f"The input has the shape {shape}; every axis must be at least 1.")
        leading = shape[0] if len(shape) > 2 else 1
        return x.reshape(leading, math.prod(shape[1 if len(shape) > 2 else 0 : -1]), self.width)

    def _check(self, params: Any, expected: list[str], place: str) -> None:
        """Raise `InputError` unless parameters have the names and shapes that `expected` lists; `place` says whose they are."""
        given = _named_shapes(params)
        require(
            given == expected,
            f"The parameters of the connection at {place} are {', '.join(given) or 'none'}; `{self.spec}` of width {self.width} "
            f"has {', '.join(expected) or 'none'}, and `init` makes them.",
        )


@functools.cache
def _shapes(wiring: Wiring) -> tuple[list[str], list[str]]:
    """Return the names and shapes of the parameters of entry and exit, and those of one branch."""
    made = jax.eval_shape(lambda: wiring.init(jax.random.key(0), stacked=True))
    branch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), made["branches"])
    return _named_shapes(made["ends"]), _named_shapes(branch)


def _named_shapes(params: Any) -> list[str]:
    """Return a text such as `phi (64, 24)` for each array."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return sorted(f"{name(path)} {getattr(leaf, 'shape', type(leaf).__name__)}" for path, leaf in leaves)


def _part(params: Any, name: str) -> Any:
    """Return `ends` or `branches` of the parameters of a connection."""
    if not isinstance(params, Mapping) or name not in params:
        raise InputError(f"The parameters of the connection have no {name!r}; give the dict that `init` made.")
    return params[name]


def _check_output(who: str, y: Any, shape: tuple[int, ...]) -> None:
    """Raise `InputError` unless y is a floating-point array of the given shape."""
    given, dtype = getattr(y, "shape", None), getattr(y, "dtype", bool)
    what = type(y).__name__ if given is None else f"an array of dtype {dtype} and shape {given}"
    require(
        given == shape and jnp.issubdtype(dtype, jnp.floating),
        f"{who} returns {what}; it must return one floating-point array of the shape of its input, {shape}.",
    )
