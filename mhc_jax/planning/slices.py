"""Slices of TPUs by name, such as `v5p:4x4x4`, `v5e:16x16`, `v6e:8x8`, `cpu:8`; programs compile for them without hardware.

Peak FLOPs, memory and links are from Google Cloud's pages of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e):
bfloat16 FLOP/s, HBM capacity and bandwidth of a chip, and the bits per second of all its ports (4 in two dimensions, 6 in three).
The pages do not name the clock.  It is the peak over 2 FLOPs x MXUs x MXU area: v4 has 8 MXUs of 128 x 128, v5e 4, v5p 8, and v6e
4 of 256 x 256.  libtpu makes two devices of a v4, each with half of everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from mhc_jax.errors import InputError, one_of, require

# Without a TPU no metadata server names the TPU, so a type is set here.  libtpu would lock a file for the whole machine, so several
# loads are allowed.  The log level spares pages of warnings.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Chip:
    """The figures of a compiler's device, which is a chip, or one of the two cores of a v4.  All figures per second are peaks."""

    name: str
    flops: float
    """Peak FLOPs per second in bfloat16."""
    bandwidth: float
    """Bandwidth of HBM in bytes per second, reads and writes together."""
    hbm: int
    """Size of HBM in bytes."""
    clock: float
    """Number of the compiler's cycles per second."""
    link: float
    """Bytes per second that one port sends in one direction."""
    dimensions: int
    """Number of dimensions of the torus of chips.  A chip has two ports in each dimension."""
    devices: int
    """Number of devices of one chip."""
    whole: int
    """Number of chips of which a side of the torus must be a multiple to close to a ring.  Other sides are lines."""
    largest: int
    """Number of chips of the largest slice."""

    def bytes_cycles(self, size: float) -> float:
        """Return the cycles that `size` bytes take at peak bandwidth."""
        return size / self.bandwidth * self.clock

    def flops_cycles(self, flops: float) -> float:
        """Return the cycles that `flops` FLOPs take at the peak rate."""
        return flops / self.flops * self.clock


CHIPS = {
    "v4": Chip("v4", 275e12 / 2, 1.2e12 / 2, 16 * 2**30, 1.05e9, 2400e9 / 8 / 6 / 2, 3, 2, 4, 4096),
    "v5e": Chip("v5e", 197e12, 0.819e12, 16 * 2**30, 1.5e9, 1600e9 / 8 / 4, 2, 1, 16, 256),
    "v5p": Chip("v5p", 459e12, 2.765e12, 95 * 2**30, 1.75e9, 4800e9 / 8 / 6, 3, 1, 4, 6144),
    "v6e": Chip("v6e", 918e12, 1.64e12, 32 * 2**30, 1.75e9, 3584e9 / 8 / 4, 2, 1, 16, 256),
}
CPU = Chip("cpu", 1e11, 2e10, 8 * 2**30, 1e9, 1e9, 1, 1, 1, 4096)
"""A CPU with round numbers, to try commands out without libtpu.  Its sizes and counts mean something, its times do not."""


@dataclass(frozen=True)
class Slice:
    """A torus of chips and its devices, which exist for the compiler only."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def platform(self) -> str:
        """The name of the platform, `tpu` or `cpu`, as `mhc_kernels.settings` takes it."""
        return "cpu" if self.chip is CPU else "tpu"

    def coordinates(self, device: Any) -> tuple[int, ...]:
        """Return the place of a device's chip along each side of the torus."""
        return (device.id,) if self.chip is CPU else tuple(device.coords)[: self.chip.dimensions]

    def bandwidth(self, spans: tuple[int, ...]) -> float:
        """Return the bytes per second that a chip sends to a group of chips.

        The chip uses both ports of every side that the group spans, or one port if the side is a line and not a ring.

        Args:
          spans: number of chips of the group along each side of the torus.
        """
        sides = zip(spans, self.sides, strict=True)
        return self.chip.link * sum(2 if side % self.chip.whole == 0 else 1 for span, side in sides if span > 1)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Read (chip, sides) from a name such as `v5p:4x4x4`.

    Raises:
      InputError: the chip is unknown, or cannot have these sides.
    """
    kind, _, shape = name.partition(":")
    one_of("The chip of --topology", kind, [*CHIPS, "cpu"])
    chip = CPU if kind == "cpu" else CHIPS[kind]
    example = {1: "8", 2: "8x8", 3: "4x4x4"}[chip.dimensions]
    require(
        re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) is not None and shape.count("x") + 1 == chip.dimensions,
        f"--topology is {name!r}; {kind} has {chip.dimensions} sides, as in {kind}:{example}.",
    )
    sides = tuple(int(side) for side in shape.split("x"))
    require(
        math.prod(sides) <= chip.largest,
        f"--topology is {name!r}, {math.prod(sides)} chips; the largest slice of {kind} has {chip.largest}.",
    )
    return chip, sides


@functools.cache
def get_slice(name: str) -> Slice:
    """Make the slice of a name such as `v5p:4x4x4`.

    Raises:
      InputError: the topology is unknown, or libtpu, the TPU compiler, is not installed.
    """
    chip, sides = parse(name)
    devices = _cpu_devices(name, sides[0]) if chip is CPU else _tpu_devices(name, sides)
    return Slice(name, chip, sides, devices)


def _cpu_devices(name: str, count: int) -> tuple[Any, ...]:
    with contextlib.suppress(RuntimeError):  # jax has made its devices already.
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    require(
        len(devices) >= count,
        f"--topology is {name!r} and this process has {len(devices)} CPU devices; set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={count}.",
    )
    return tuple(devices[:count])


def _tpu_devices(name: str, sides: tuple[int, ...]) -> tuple[Any, ...]:
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--topology is {name!r} and libtpu, the TPU compiler, is not installed; run `make aot` once and put .venv/aot on "
        f"PYTHONPATH (it needs no TPU).",
    )
    os.environ.update(LIBTPU_ENVIRONMENT)
    # By default libtpu knows only slices of whole hosts, which have four chips each.
    host = [2, 2, 1] if sides[0] % 2 == sides[1] % 2 == 0 else [1, 1, 1]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
    except Exception as error:  # libtpu raises this for a shape that was never built.
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology is {name!r}, which libtpu does not know: {reason}") from error
    # jax can write a program for an absent device to its cache of compiled programs but not read it, so nothing is cached.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    return tuple(topology.devices)
