"""Choose the backend that runs an operation, and the kind of device that a program is traced for."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.sharding import PartitionSpec

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu", "triton")
_UNSPLIT = PartitionSpec()
_PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "triton": "gpu"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values that the context manager `settings` has set, with one field for each of its arguments."""

    implementation: str | None = None
    platform: str | None = None
    interpret: bool = False
    token_axes: PartitionSpec = _UNSPLIT


_settings = contextvars.ContextVar("mhc_kernels.settings", default=Settings())  # noqa: B039
_warned: set[tuple[str, str]] = set()


@contextlib.contextmanager
def settings(
    implementation: str | None = None,
    platform: str | None = None,
    interpret: bool | None = None,
    token_axes: PartitionSpec | None = None,
) -> Iterator[None]:
    """Choose the backends, the kind of device and the mesh axes of every operation that is traced inside this context manager.

    An argument that is left out keeps its value from an enclosing `settings`.  A function that `jax.jit` has already traced does
    not change.

    Args:
      implementation: the backend of every call with `implementation=None`; `xla` means plain XLA without kernels.
      platform: `cpu`, `gpu` or `tpu`, the kind of device that the program is traced for.  It is needed when this is not the
        default backend of JAX (ahead-of-time compilation).
      interpret: whether Pallas kernels run in interpret mode, which any device can do.
      token_axes: mesh axes that split the leading token axes ([B, T]) of streams and coefficients.  Each operation then runs
        under `jax.shard_map` over the mesh of `jax.set_mesh` (see `sharded.py`).  An empty PartitionSpec turns this off.

    Raises:
      ValueError: unknown implementation or platform.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mhc_kernels import read, settings
      >>> with settings(implementation="pallas_gpu", interpret=True):  # a GPU kernel, on any device
      ...     read(jnp.arange(64.0).reshape(1, 64), jnp.array([[1.0], [-1.0]]), 2)[0, :3].tolist()
      [-32.0, -32.0, -32.0]
    """
    if implementation is not None:
        _known(implementation)
    if platform not in (None, "cpu", "gpu", "tpu"):
        raise ValueError(f"platform is {platform!r}; it must be 'cpu', 'gpu' or 'tpu'.")
    given = {"implementation": implementation, "platform": platform, "interpret": interpret, "token_axes": token_axes}
    chosen = {name: value for name, value in given.items() if value is not None}
    token = _settings.set(dataclasses.replace(_settings.get(), **chosen))
    try:
        yield
    finally:
        _settings.reset(token)


def platform() -> str:
    """Return the kind of device that programs are traced for: `cpu`, `gpu` or `tpu`."""
    return _settings.get().platform or {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())


def interpret() -> bool:
    """Return whether Pallas kernels run in interpret mode."""
    return _settings.get().interpret


def token_axes() -> PartitionSpec:
    """Return the mesh axes that split the leading token axes, as `settings` has set them; empty means no `jax.shard_map`."""
    return _settings.get().token_axes


def _known(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; it must be None or one of {', '.join(IMPLEMENTATIONS)}.")


def choose(op: str, requested: str | None, obstacles: Mapping[str, Callable[[], str | None]]) -> str:
    """Return the name of the implementation that will run a call of the operation `op`.

    Args:
      op: name of the operation, for messages.
      requested: the `implementation` that the caller named, or None.
      obstacles: for each backend but `xla`, a function that returns why the backend cannot run this call, or None if it can.  A
        backend that is not listed has no kernel for this operation.

    Returns:
      The implementation that the caller or else `settings` named.  If none was named, the backend with kernels for the platform.
      If there is no such backend, `xla`.  If there is one that cannot run the call, `xla` with one warning that gives the reason.

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    name = requested or _settings.get().implementation
    if name is not None:
        _known(name)
        reason = _obstacle(name, obstacles)
        if reason is None:
            return name
        able = [other for other in IMPLEMENTATIONS if _obstacle(other, obstacles) is None]
        raise ValueError(f"{op}: implementation {name!r} cannot run this: {reason}. Here {', '.join(able)} can.")
    reason = None
    for candidate, needs in _PLATFORM_OF.items():
        # The `triton` backend needs packages beyond jax, so it runs only when a caller names it.
        if needs != platform() or candidate == "triton" or candidate not in obstacles:
            continue
        reason = _obstacle(candidate, obstacles)
        if reason is None:
            return candidate
        if (op, reason) not in _warned:
            _warned.add((op, reason))
            warnings.warn(f"mhc_kernels.{op} runs as plain XLA, not {candidate}: {reason}.", stacklevel=4)
    return "xla"


def _obstacle(name: str, obstacles: Mapping[str, Callable[[], str | None]]) -> str | None:
    if name == "xla":
        return None
    if name not in obstacles:
        return "it does not have this operation"
    needs = _PLATFORM_OF[name]
    if needs != platform() and not interpret():
        return f"it needs a {needs.upper()} and the program is traced for a {platform().upper()}"
    return obstacles[name]()
