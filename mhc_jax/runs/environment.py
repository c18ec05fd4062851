"""Where and from what a run was made: device, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("mhc-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


COMMAND = "MHC_JAX_COMMAND"
"""Environment variable in which a sweep hands its own command on to the processes that it starts."""


def command() -> str:
    """The command that a person typed: that of the sweep in its workers, else this process's."""
    return os.environ.get(COMMAND) or shlex.join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """Date (UTC), command, commit and dirty flag (None outside a checkout), Python, packages, devices."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": devices[0].platform,
        "device": devices[0].device_kind if devices[0].platform != "cpu" else f"cpu ({platform.machine()})",
        "device_count": len(devices),
    }
