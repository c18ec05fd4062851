"""Record the circumstances of a run: devices, versions of packages, commit and command."""

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

from mhc_jax.config import ExperimentConfig
from mhc_jax.parallel import distributed

COMMAND = "MHC_JAX_COMMAND"
"""Name of the environment variable through which a sweep passes its command to the processes that it starts."""

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


def command() -> str:
    """Return the command that a person typed: the command of the sweep in a process of a sweep, else of this process."""
    return os.environ.get(COMMAND) or shlex.join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """Return the values of env.json: date (UTC), command, commit, Python, packages and devices.

    `dirty` says whether files differ from the commit.  `commit` and `dirty` are None outside a git checkout.
    """
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


def devices_of(config: ExperimentConfig) -> dict[str, Any]:
    """Return the entries about mesh and processes in env.json, summary.json and events.

    There is no `mesh` for a single device, and no `processes` for a single process.
    """
    mesh = {"mesh": str(config.mesh)} if config.mesh.size > 1 else {}
    return mesh | ({"processes": jax.process_count()} if distributed.is_multiprocess() else {})
