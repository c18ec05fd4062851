"""Run operations over a mesh: every device runs an operation on the tokens that it holds.

XLA's partitioner cannot look into kernels, and it often gathers all tokens on every device for a loop or reshape over tokens.  An
operation treats each token by itself, so `jax.shard_map` can run it on each device alone.  Every device holds all parameters.  The
gradient of a parameter is a sum over the tokens of all devices, and this sum is the only communication.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from mhc_kernels import backend_choice

Operation = TypeVar("Operation", bound=Callable[..., Any])


def over_tokens(result: Any, **arguments: Any) -> Callable[[Operation], Operation]:
    """Make a decorator that runs an operation under `jax.shard_map` if `settings(token_axes=...)` is set, or else unchanged.

    Args:
      result: the number of axes in front of the token axes in each result, as a pytree with the structure of the results.
      **arguments: the number of axes in front of the token axes, for each argument that has token axes.  Every device holds the
        whole of any other array.
    """

    def decorate(operation: Operation) -> Operation:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def run(*args: Any, **kwargs: Any) -> Any:
            tokens = backend_choice.token_axes()
            if not tokens:
                return operation(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            arrays = {name: a for name, a in given.items() if name in arguments or isinstance(a, jax.Array)}
            static = {name: a for name, a in given.items() if name not in arrays}

            def specs(leading: Any) -> Any:
                return jax.tree.map(lambda axes: PartitionSpec(*(None,) * axes, *tokens), leading)

            names = tuple(name for axes in tokens for name in (axes if isinstance(axes, tuple) else (axes,)) if name)
            # Pallas' interpreter does not track which values vary between devices, so `check_vma` is off for it.
            checked = not backend_choice.interpret()

            def on_one_device(arrays: dict[str, Any]) -> Any:
                # With this `pcast` the gradient of a parameter is summed over devices once, and not at each use.
                if checked and names:
                    varying = {k: jax.lax.pcast(a, names, to="varying") for k, a in arrays.items() if k in whole}
                    arrays = arrays | varying
                with backend_choice.settings(token_axes=PartitionSpec()):
                    return operation(**arrays, **static)

            whole = arrays.keys() - arguments.keys()
            in_specs = {name: PartitionSpec() if name in whole else specs(arguments[name]) for name in arrays}
            split = jax.shard_map(on_one_device, in_specs=(in_specs,), out_specs=specs(result), check_vma=checked)
            return split(arrays)

        return run  # type: ignore[return-value]

    return decorate
