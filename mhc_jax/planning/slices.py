"""Slices of TPUs by name, compiled for without being there: `v5p:4x4x4`, `v5e:16x16`, `v6e:8x8`, `cpu:8`.

Peak FLOPs, memory and links are those of Google Cloud's pages of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e):
bfloat16 FLOP/s, HBM capacity and bandwidth of a chip, and its interconnect's bits per second over its ports (4 in two dimensions,
6 in three).  The clock, which they do not name, is the peak over 2 FLOPs x MXUs x MXU area: v4 8 of 128 x 128, v5e 4, v5p 8,
v6e 4 of 256 x 256.  Of a v4 libtpu makes two devices, each with half of everything.
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

# No metadata server says which TPU this is, and libtpu locks a file of the whole machine; the rest spares pages of warnings.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Chip:
    """What the compiler calls a device: a chip, of v4 one of its two cores; all per second figures are peaks."""

    name: str
    flops: float
    """bfloat16 FLOP/s."""
    bandwidth: float
    """HBM, bytes/s, reads and writes together."""
    hbm: int
    """Bytes."""
    clock: float
    """Hz: what the compiler's cycles count."""
    link: float
    """Bytes/s of one port, one way."""
    dimensions: int
    """Of the torus of chips; two ports each."""
    devices: int
    """Of one chip."""
    whole: int
    """A side that closes to a ring: any multiple of it.  Shorter sides are lines."""
    largest: int
    """Chips of the largest slice."""

    def bytes_cycles(self, size: float) -> float:
        """Cycles that `size` bytes take at peak bandwidth."""
        return size / self.bandwidth * self.clock

    def flops_cycles(self, flops: float) -> float:
        """Cycles that `flops` take at the peak."""
        return flops / self.flops * self.clock


CHIPS = {
    "v4": Chip("v4", 275e12 / 2, 1.2e12 / 2, 16 * 2**30, 1.05e9, 2400e9 / 8 / 6 / 2, 3, 2, 4, 4096),
    "v5e": Chip("v5e", 197e12, 0.819e12, 16 * 2**30, 1.5e9, 1600e9 / 8 / 4, 2, 1, 16, 256),
    "v5p": Chip("v5p", 459e12, 2.765e12, 95 * 2**30, 1.75e9, 4800e9 / 8 / 6, 3, 1, 4, 6144),
    "v6e": Chip("v6e", 918e12, 1.64e12, 32 * 2**30, 1.75e9, 3584e9 / 8 / 4, 2, 1, 16, 256),
}
CPU = Chip("cpu", 1e11, 2e10, 8 * 2**30, 1e9, 1e9, 1, 1, 1, 4096)
"""Round numbers, for tests of the command where there is no libtpu: sizes and counts mean something, times do not."""


@dataclass(frozen=True)
class Slice:
    """A topology and its devices, which exist for the compiler only."""

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def platform(self) -> str:
        """`tpu` or `cpu`, as `mhc_kernels.settings` takes it."""
        return "cpu" if self.chip is CPU else "tpu"

    def coordinates(self, device: Any) -> tuple[int, ...]:
        """Of a chip in the torus."""
        return (device.id,) if self.chip is CPU else tuple(device.coords)[: self.chip.dimensions]

    def bandwidth(self, spans: tuple[int, ...]) -> float:
        """Bytes/s that a chip sends to a group of chips, `spans` chips long on each side of the torus.

        Both ports of every side that the group spans; one, where the side is a line and not a ring.
        """
        sides = zip(spans, self.sides, strict=True)
        return self.chip.link * sum(2 if side % self.chip.whole == 0 else 1 for span, side in sides if span > 1)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """(chip, sides) of `v5p:4x4x4`.

    Raises:
      InputError: an unknown chip, or sides it cannot have.
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
    """The topology of that name.

    Raises:
      InputError: an unknown topology, or libtpu, the TPU compiler, is not there.
    """
    chip, sides = parse(name)
    if chip is CPU:
        with contextlib.suppress(RuntimeError):  # the devices are there already
            jax.config.update("jax_num_cpu_devices", sides[0])
        found = jax.devices("cpu")
        require(
            len(found) >= sides[0],
            f"--topology is {name!r} and this process has {len(found)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={sides[0]}.",
        )
        return Slice(name, chip, sides, tuple(found[: sides[0]]))
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--topology is {name!r} and libtpu, the TPU compiler, is not installed; run `make aot` once and put .venv/aot on "
        f"PYTHONPATH (it needs no TPU).",
    )
    os.environ.update(LIBTPU_ENVIRONMENT)
    # By default libtpu knows multiples of the four chips of a host only.
    host = [2, 2, 1] if sides[0] % 2 == sides[1] % 2 == 0 else [1, 1, 1]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
    except Exception as error:  # what libtpu raises for a shape that was never built
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--topology is {name!r}, which libtpu does not know: {reason}") from error
    # A program compiled for a device that is not here can be written to the cache of compiled programs and not read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    return Slice(name, chip, sides, tuple(topology.devices))
