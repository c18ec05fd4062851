"""Slices of TPUs with names such as `v5p:4x4x4`, `v6e:8x8` or `cpu:8`, for which programs are compiled without the hardware.

The figures of each chip are from Google Cloud's page about it (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e): its bfloat16
FLOP/s, the size and bandwidth of its HBM, and the bits per second of all its ports (4 in two dimensions, 6 in three).  The pages do
not state the clock.  The clock is computed as the peak FLOP/s, divided by the FLOPs of all matrix units (MXUs) in one cycle, which
are 2 for each element of an MXU.  A v4 has 8 MXUs of 128 x 128, a v5e 4, a v5p 8, and a v6e 4 of 256 x 256.  libtpu makes two
devices of a v4 chip, each with half of the figures.
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

# Without a TPU no metadata server tells libtpu the type of TPU, so a type is set here.  By default libtpu locks a file, so that
# only one process can load it at a time.  Here several processes may.  The log level hides pages of warnings.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Chip:
    """The figures of one device, which is a chip, or one of the two cores of a v4 chip.  All figures per second are peaks."""

    name: str
    flops: float
    """Peak FLOPs per second in bfloat16."""
    bandwidth: float
    """Bandwidth of HBM in bytes per second, reads and writes together."""
    hbm: int
    """Size of HBM in bytes."""
    clock: float
    """Cycles per second, to convert the cycles that the compiler estimates into seconds."""
    link: float
    """Bytes per second that one port sends in one direction."""
    dimensions: int
    """Number of dimensions of the torus of chips.  A chip has two ports in each dimension."""
    devices: int
    """Number of devices that libtpu makes of one chip."""
    whole: int
    """A side of the torus is a ring if its number of chips is a multiple of this number.  Otherwise the side is a line."""
    largest: int
    """Number of chips of the largest slice of this kind."""

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
"""A CPU with invented round figures, to try out commands without libtpu.  Times that are estimated for it have no meaning."""


@dataclass(frozen=True)
class Slice:
    """A torus of chips, whose devices exist for the compiler only."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def platform(self) -> str:
        """Name of the platform, `tpu` or `cpu`, as `mhc_kernels.settings` takes it."""
        return "cpu" if self.chip is CPU else "tpu"

    def coordinates(self, device: Any) -> tuple[int, ...]:
        """Return the position of a device's chip along each side of the torus, counted from 0."""
        return (device.id,) if self.chip is CPU else tuple(device.coords)[: self.chip.dimensions]

    def bandwidth(self, spans: tuple[int, ...]) -> float:
        """Return the bytes per second that a chip of a group sends to the rest of the group.

        On every side of the torus that the group spans, the chip uses both of its ports if the side is a ring, and else one port.

        Args:
          spans: number of positions that the group takes up along each side of the torus.
        """
        sides = zip(spans, self.sides, strict=True)
        return self.chip.link * sum(2 if side % self.chip.whole == 0 else 1 for span, side in sides if span > 1)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Return (chip, number of chips along each side) of a name such as `v5p:4x4x4`.

    Raises:
      InputError: the chip is unknown, or a slice of this chip cannot have these sides.
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
    with contextlib.suppress(RuntimeError):  # jax raises this if its devices exist already.
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
    # By default libtpu makes slices of whole hosts with 2 x 2 chips each.  An odd first or second side needs hosts of one chip.
    host = [2, 2, 1] if sides[0] % 2 == sides[1] % 2 == 0 else [1, 1, 1]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
    except Exception as error:  # libtpu raises an error for a shape that does not exist.
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology is {name!r}, which libtpu does not know: {reason}") from error
    # jax cannot load programs for absent devices from its compilation cache.  This limit keeps them out of the cache.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    return tuple(topology.devices)
