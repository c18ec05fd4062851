"""Names of TPU slices: what is known, what is refused, and what a group of chips can send."""

import importlib.util

import pytest

from mhc_jax import topology
from mhc_jax.errors import InputError

WRONG = {
    "v5f:4x4": "chip of --topology is 'v5f'; it must be one of 'v4', 'v5e', 'v5p', 'v6e', 'cpu'. Did you mean 'v5",
    "v5p": "--topology is 'v5p'; v5p has 3 sides, as in v5p:4x4x4",
    "v5p:16x16": "--topology is 'v5p:16x16'; v5p has 3 sides",
    "v5e:4x4x4": "v5e has 2 sides, as in v5e:8x8",
    "v6e:0x8": "v6e has 2 sides",
    "v5e:16x32": "512 chips; the largest slice of v5e has 256",
    "cpu:999": "this process has 8 CPU devices; set XLA_FLAGS=--xla_force_host_platform_device_count=999",
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_are_none_are_told(name):
    with pytest.raises(InputError, match=WRONG[name].replace("(", r"\(")):
        topology.get_slice(name)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="libtpu, the TPU compiler, is not installed; run `make aot`"):
        topology.get_slice("v6e:2x2")


@pytest.mark.parametrize("chip", topology.CHIPS.values(), ids=lambda chip: chip.name)
def test_clock_is_the_peak_over_the_matrix_units(chip):
    units = {"v4": 4 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}[chip.name]
    assert chip.flops / (2 * units) == pytest.approx(chip.clock, rel=3e-3)
    assert chip.flops_cycles(chip.flops) == chip.clock == chip.bytes_cycles(chip.bandwidth)


def test_bandwidth_is_that_of_the_ports_a_group_spans():
    sides, v5p = (4, 8, 2), topology.CHIPS["v5p"]
    slice_ = topology.Slice("v5p:4x8x2", v5p, sides, ())
    assert slice_.bandwidth((4, 1, 1)) == pytest.approx(200e9)
    assert slice_.bandwidth((4, 8, 1)) == pytest.approx(400e9)
    assert slice_.bandwidth((1, 1, 2)) == pytest.approx(100e9), "a side of 2 is a line"
    v6e = topology.Slice("v6e:8x8", topology.CHIPS["v6e"], (8, 8), ())
    assert v6e.bandwidth((8, 1)) == pytest.approx(112e9), "only sides of 16 close"


def test_devices_of_a_cpu():
    slice_ = topology.get_slice("cpu:4")
    assert [slice_.coordinates(device) for device in slice_.devices] == [(0,), (1,), (2,), (3,)]
    assert slice_.platform == "cpu"


@pytest.mark.parametrize(("name", "devices"), [("v5p:2x2x2", 8), ("v4:2x2x1", 8), ("v6e:1x1", 1), ("v5e:2x4", 8)])
def test_devices_of_a_tpu(name, devices):
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    slice_ = topology.get_slice(name)
    assert len(slice_.devices) == devices
    assert slice_.platform == "tpu"
    chips = {slice_.coordinates(device) for device in slice_.devices}
    assert len(chips) * slice_.chip.devices == devices
    assert max(chips) == tuple(side - 1 for side in slice_.sides)
