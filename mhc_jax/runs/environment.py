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
"""Name of the environment variable in which a sweep hands its own command line to the processes that it starts."""

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
    """Return the command line that a person typed: that of the sweep if a sweep started this process, else that of this process."""
    return os.environ.get(COMMAND) or shlex.join(["python", *sys.argv])


def environment() -> dict[str, Any]:
    """Return the entries of env.json: date (UTC), command line, commit, and versions of Python, packages and devices.

    `dirty` says whether files differ from the commit in git.  `commit` and `dirty` are None outside a git checkout.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": jax.devices()[0].platform,
        "device": device_name(),
        "device_count": jax.device_count(),
    }


def device_name() -> str:
    """Return the kind of the first device, such as `NVIDIA H100 80GB HBM3` or `cpu (x86_64)`."""
    device = jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})"


def devices_of(config: ExperimentConfig) -> dict[str, Any]:
    """Return the mesh and the number of processes of a run, as entries of env.json, summary.json and events.

    The entry `mesh` is missing for a single device, and `processes` for a single process.
    """
    mesh = {"mesh": str(config.mesh)} if config.mesh.size > 1 else {}
    return mesh | ({"processes": jax.process_count()} if distributed.is_multiprocess() else {})


def used_devices(config: ExperimentConfig) -> str:
    """Return how many devices of which kind a run uses, as text: `1 x cpu (x86_64)` or `4 x TPU v5 of 8, mesh fsdp 4`."""
    used, there = config.mesh.size, jax.device_count()
    of_all = f" of {there}" if there > used else ""
    return f"{used} x {device_name()}{of_all}" + (f", mesh {config.mesh}" if used > 1 else "")
