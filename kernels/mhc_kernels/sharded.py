"""Operations over a mesh: every device runs an operation on the tokens that it holds.

XLA's partitioner cannot look into kernels, and it often gathers all tokens for loops and reshapes over them.  No operation needs
another token, so `jax.shard_map` is enough.  Parameters are whole on every device.  Their gradient is the sum over the devices'
tokens, which is the only communication.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from mhc_kernels import choice

Operation = TypeVar("Operation", bound=Callable[..., Any])


def over_tokens(result: Any, **arguments: Any) -> Callable[[Operation], Operation]:
    """Run an operation under `jax.shard_map` where `settings(token_axes=...)` is set, and as it is elsewhere.

    Args:
      result: the number of axes in front of the tokens, as a pytree of the structure that the operation returns.
      **arguments: the same for each argument that has tokens; other arrays are whole on every device.
    """

    def decorate(operation: Operation) -> Operation:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def run(*args: Any, **kwargs: Any) -> Any:
            tokens = choice.token_axes()
            if not tokens:
                return operation(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            arrays = {name: a for name, a in given.items() if name in arguments or isinstance(a, jax.Array)}
            static = {name: a for name, a in given.items() if name not in arrays}

            def specs(leading: Any) -> Any:
                return jax.tree.map(lambda axes: PartitionSpec(*(None,) * axes, *tokens), leading)

            names = tuple(name for axes in tokens for name in (axes if isinstance(axes, tuple) else (axes,)) if name)
            # Pallas' interpreter does not track which values vary between devices.
            checked = not choice.interpret()

            def on_one_device(arrays: dict[str, Any]) -> Any:
                if checked and names:  # so that each parameter has one sum over the devices, not one a use
                    varying = {k: jax.lax.pcast(a, names, to="varying") for k, a in arrays.items() if k in whole}
                    arrays = arrays | varying
                with choice.settings(token_axes=PartitionSpec()):
                    return operation(**arrays, **static)

            whole = arrays.keys() - arguments.keys()
            in_specs = {name: PartitionSpec() if name in whole else specs(arguments[name]) for name in arrays}
            split = jax.shard_map(on_one_device, in_specs=(in_specs,), out_specs=specs(result), check_vma=checked)
            return split(arrays)

        return run  # type: ignore[return-value]

    return decorate
