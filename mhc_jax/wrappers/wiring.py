"""A connection around any list of branches, as pure functions of parameters: the form for bare JAX, Equinox and own loops.

A branch is a function from an array [..., C] to an array of the same shape, with its own norm inside, such as attention or a
feed-forward.  Where a model adds the output of branch l to its input, x + F_l(x), `Wiring` puts any kind of connection instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.connections import Connection, connection_module, parse
from mhc_jax.diagnostics import sample_sublayer
from mhc_jax.errors import require

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

    spec: str
    """The connection as text, `kind` or `kind:setting=value:...`, such as `mhc:num_streams=4`."""
    width: int
    """Number C of channels, the last axis of every array."""
    num_branches: int
    """Number L of branches.  Attention and feed-forward count as two."""

    def __post_init__(self) -> None:
        parse(self.spec)
        require(self.width >= 1, f"width is {self.width}; it must be at least 1.")
        require(self.num_branches >= 1, f"num_branches is {self.num_branches}; give at least one branch.")

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
        x = jnp.zeros((1, 1, self.width))
        state = jax.eval_shape(lambda: self.start({"ends": self._ends(key, x)}, x))
        keys = jax.random.split(key, self.num_branches)

        def of_branch(index: Any, key: Array) -> Params:
            streams, c, y = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state[:3])
            made: Any = self.module(index).init(key, streams, c, y, method="write_read")
            return made.get("params", {})

        if stacked:
            branches: Any = jax.vmap(of_branch)(jnp.arange(self.num_branches), keys)
        else:
            branches = [of_branch(index, k) for index, k in enumerate(keys)]
        made = {"ends": self._ends(key, x), "branches": branches}
        return jax.tree.map(lambda a: a.astype(jnp.float32), made)

    def _ends(self, key: Array, x: Array) -> Params:
        made: Any = self.module(None).init(key, x, method="start")
        return made.get("params", {})

    def start(self, params: Params, x: Float[Array, "B T C"]) -> State:
        """Make the state before the first branch from the input of the model."""
        made: Any = self.module(None).apply({"params": params["ends"]}, x, method="start")
        streams, c = made
        return State(streams, c, jnp.zeros_like(x))

    def boundary(self, branch_params: Params, state: State) -> tuple[State, Float[Array, "B T C"]]:
        """Write the output of the last branch to the streams, and read the input of the next branch.

        Args:
          branch_params: parameters of the connection at the next branch: an entry of `branches`, or a slice of the stack.
          state: the state with the output of the last branch.

        Returns:
          the state, to which `put` adds the output of the next branch, and the input of that branch.
        """
        link = self.module(state.branch)
        made: Any = link.apply({"params": branch_params}, *state[:3], method="write_read")
        streams, c, h = made
        return State(streams, c, state.y, state.branch + 1), h

    def put(self, state: State, y: Any) -> State:
        """Return the state with the output y of the branch whose input was just read, in the dtype of the streams' input.

        Raises:
          InputError: y is no array of the shape of that input.
        """
        shape = getattr(y, "shape", None)
        require(
            shape == state.y.shape,
            f"A branch returns {f'an array of shape {shape}' if shape is not None else type(y).__name__}; it must return an array "
            f"of the shape of its input, {state.y.shape}.",
        )
        return state._replace(y=y.astype(state.y.dtype))

    def finish(self, params: Params, state: State) -> Float[Array, "B T C"]:
        """Write the output of the last branch, and return the output of the model: one vector made of the streams."""
        ends, given = self.module(None), {"params": params["ends"]}
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
          InputError: the number of branches or of channels is another one, or a branch returns another shape.
        """
        listed = self.parameters_of_branches(params)
        state, collected = self.start(params, self.flat(x, len(branches))), []
        for number, (branch, own) in enumerate(zip(branches, listed, strict=True)):
            state, h = self.boundary(own, state)
            y = branch(h.reshape(x.shape), *args, **options)
            shape = getattr(y, "shape", None)
            require(
                shape == x.shape,
                f"Branch {number} returns {f'an array of shape {shape}' if shape is not None else type(y).__name__}; it must "
                f"return an array of the shape of its input, {x.shape}.",
            )
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
        given = params["branches"]
        if isinstance(given, (list, tuple)):
            found = len(given)
        else:
            sizes = {a.shape[0] for a in jax.tree.leaves(given)} or {self.num_branches}
            found = sizes.pop() if len(sizes) == 1 else 0
            given = [jax.tree.map(lambda a, i=i: a[i], given) for i in range(found)]
        require(
            found == self.num_branches,
            f"The parameters are those of {found} branches, not of {self.num_branches}; `init` makes them.",
        )
        return list(given)

    def flat(self, x: Float[Array, "*shape C"], branches: int) -> Float[Array, "B T C"]:
        """Return the input as [B, T, C], after checks of its channels and of the number of branches."""
        require(
            branches == self.num_branches, f"There are {branches} branches, not {self.num_branches} as in the wiring."
        )
        require(
            x.shape[-1:] == (self.width,), f"The input has the shape {x.shape}; its last axis must be {self.width}."
        )
        leading = x.shape[0] if x.ndim > 2 else 1
        return x.reshape(leading, math.prod(x.shape[1 if x.ndim > 2 else 0 : -1]), self.width)
