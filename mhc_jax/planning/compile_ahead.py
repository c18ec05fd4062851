"""Tracing and compiling of a train step for a slice of TPUs that this machine does not have."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import mhc_kernels

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.run import fits_splash
from mhc_jax.errors import InputError, require
from mhc_jax.parallel import sharding
from mhc_jax.planning.slices import Slice
from mhc_jax.train_step import compiler_options, init_state, make_train_step


def best_attention(config: ExperimentConfig, platform: str) -> ExperimentConfig:
    """Return the configuration with `splash` attention in place of `xla` attention, if the platform can run it.

    `xla` attention writes T x T scores to memory, and `splash` attention, a Pallas kernel for TPUs, does not.
    """
    model = config.model
    if platform != "tpu" or model.attention != "xla" or not fits_splash(config) or config.mesh.sequence > 1:
        return config
    return config.with_settings(model={"attention": "splash"})


@dataclass(frozen=True)
class LoweredStep:
    """A train step that is traced and lowered, but not compiled."""

    lowered: Any
    mesh: Any
    """The `jax.sharding.Mesh` of the step, or None for one device."""
    state: Any
    """Shapes, dtypes and shardings of the train state."""


def lower(config: ExperimentConfig, where: Slice, implementation: str | None) -> LoweredStep:
    """Trace and lower the train step of a configuration for a slice, over whose devices config.mesh shards it.

    Args:
      config: the configuration.  Its mesh has all devices of the slice, its vocabulary is known, and its model.remat is not `auto`.
      where: the slice.  This machine need not have its devices.
      implementation: name of the implementation of the connections' operations.  None takes the platform's default.

    Raises:
      InputError: the mesh does not fit the slice.
    """
    devices = len(where.devices)
    require(
        config.mesh.size == devices,
        f"The mesh ({config.mesh}) has {config.mesh.size} devices and {where.name} has {devices}; set "
        f"--config.mesh.fsdp={devices}, or several axes with that product.",
    )
    try:
        mesh = sharding.make_mesh(config.mesh, where.devices)
    except NotImplementedError as error:
        # jax.make_mesh can lay a mesh axis along one or more whole sides of the torus, and not along a part of a side.
        sides = " x ".join(map(str, where.sides))
        raise InputError(
            f"The mesh ({config.mesh}) cannot be laid on {where.name}; every axis must be a product of whole sides of {sides}."
        ) from error
    with mhc_kernels.settings(platform=where.platform, implementation=implementation), sharding.using(mesh):
        state = jax.eval_shape(lambda: init_state(config))
        if mesh is None:
            of_batch: Any = jax.sharding.SingleDeviceSharding(where.devices[0])
            of_state = jax.tree.map(lambda _: of_batch, state)
            shardings: Any = None
        else:
            of_batch, of_state = sharding.batch_sharding(mesh), sharding.state_shardings(mesh, state)
            shardings = of_state, None
        options = compiler_options()
        step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=shardings, compiler_options=options)
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, of_state)
        shape = (config.data.batch_size, config.data.sequence_length)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=of_batch)
        return LoweredStep(step.lower(state, {"inputs": tokens, "targets": tokens}), mesh, state)


class DoesNotFitError(Exception):
    """The compiler reports that a program does not fit into the memory of a device.

    `needs` and `has` are the bytes that the program needs and that the device has, or None if the report lacks them.
    """

    def __init__(self, text: str):
        super().__init__(text)
        sizes = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", text)
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        self.needs, self.has = (
            (int(float(sizes[1]) * unit[sizes[2]]), int(float(sizes[3]) * unit[sizes[4]])) if sizes else (None, None)
        )


def compile_lowered(lowered: Any) -> Any:
    """Compile a lowered program in a thread, so that Ctrl-C stops this process at once and not after minutes.

    Raises:
      DoesNotFitError: the program does not fit into the memory of a device.
    """
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            done["program"] = lowered.compile()
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if "error" in done:
        text = str(done["error"])
        if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
            raise DoesNotFitError(text) from done["error"]
        raise done["error"]
    return done["program"]
