"""What a run needs to begin: its compiled steps, its batches and its first train state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import connection_module
from mhc_jax.cost import counts
from mhc_jax.data import Batch, Data
from mhc_jax.data.arrays import Show
from mhc_jax.optim import optimizer
from mhc_jax.parallel import distributed
from mhc_jax.parallel.sharding import batch_sharding, global_batch, local_rows, replicate, state_shardings
from mhc_jax.runs.history import Clock
from mhc_jax.train_step import (
    TrainState,
    compiler_options,
    init_state,
    make_diagnostics_step,
    make_eval_step,
    make_train_step,
    make_unstaged_step,
)
from mhc_jax.user_functions import is_function


class Feed:
    """The batches of a run for training, validation and diagnostics.  Each process reads the rows that its devices hold."""

    def __init__(self, data: Data, config: ExperimentConfig, mesh: Mesh | None):
        self._mesh = mesh
        self._shape = (config.data.batch_size, config.data.sequence_length)
        self._rows = local_rows(mesh, self._shape) if mesh and distributed.is_multiprocess() else None
        count = config.train.validation_batches
        self.train = data.train_iterator(rows=self._rows)
        self.validation = data.validation_batches(count, self._rows)
        self.bits_per_nat = data.bits_per_nat(count)
        # Diagnostics use one held-out sequence, the same at every diagnostics step and in every run of a comparison.
        self.diagnostic_tokens: Any = data.validation_batches(1, np.arange(1))[0]["inputs"]
        if mesh and self._rows is not None:
            self.diagnostic_tokens = replicate(mesh, self.diagnostic_tokens)

    def placed(self, batch: Batch) -> Any:
        """Return the batch as arrays that are split over the devices of the mesh.  Without a mesh return `batch` itself."""
        if self._mesh is None:
            return batch
        if self._rows is None:
            return jax.device_put(batch, batch_sharding(self._mesh))
        return {name: global_batch(self._mesh, self._shape, self._rows, part) for name, part in batch.items()}


def abstract_state(config: ExperimentConfig, mesh: Mesh | None) -> TrainState:
    """Return the shapes, dtypes and shardings of the train state on the devices of this run.

    If a function of the user's makes the optimizer, one update is traced too.

    Raises:
      InputError: the function of the user's fails.
    """
    shapes = jax.eval_shape(_initializer(config, mesh))
    if is_function(config.optimizer.name):
        tx = optimizer(config.optimizer, config.train.steps, connection_module(config.model.connection))
        jax.eval_shape(tx.update, shapes.params, shapes.opt_state, shapes.params)
    # Shardings must name devices of this machine, because a checkpoint names those of the machine that wrote it.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = state_shardings(mesh, shapes) if mesh else jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def first_state(config: ExperimentConfig, mesh: Mesh | None, abstract: TrainState) -> TrainState:
    """Return the train state before the first step, with the shardings of `abstract` if there is a mesh."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract) if mesh else None
    program = jax.jit(_initializer(config, mesh), out_shardings=shardings).lower().compile()
    distributed.barrier()
    return program()


@functools.lru_cache(maxsize=1)
def _initializer(config: ExperimentConfig, mesh: Mesh | None) -> Callable[[], TrainState]:
    """Return `init_state` of a configuration on a mesh, as the same function at every call, so that JAX traces it once."""
    return lambda: init_state(config)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of an array of which each device of the mesh holds a full copy; None without a mesh."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else None


def trace_train_step(config: ExperimentConfig, mesh: Mesh | None, abstract: TrainState) -> Any:
    """Return the train step as a traced program (`jax.stages.Traced`).  It donates the arrays of its input state."""
    shardings = (jax.tree.map(lambda a: a.sharding, abstract), replicated(mesh)) if mesh else None
    options = compiler_options()
    step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=shardings, compiler_options=options)
    return step.trace(abstract, _example(config, mesh))


def flops_per_token(config: ExperimentConfig, mesh: Mesh | None, abstract: TrainState, traced: Any) -> float:
    """Return the FLOPs of a train step divided by its number of tokens.

    `traced` is the train step.  For a pipeline the FLOPs of the same step without stages are counted (`make_unstaged_step`).
    """
    if config.mesh.stage > 1:
        traced = jax.jit(make_unstaged_step(config)).trace(abstract, _example(config, mesh))
    return counts.jaxpr_flops(traced.jaxpr) / (config.data.batch_size * config.data.sequence_length)


def _example(config: ExperimentConfig, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape [B, T], dtype and sharding of the inputs and of the targets of a batch."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh) if mesh else None)
    return {"inputs": tokens, "targets": tokens}


@dataclass(frozen=True)
class Programs:
    """The compiled steps of a run.  The functions `make_*_step` of the module `train_step` describe them."""

    train: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    validate: Callable[[Any, Any], jax.Array]
    diagnose: Callable[[Any, Any], dict[str, jax.Array]] | None
    """The compiled diagnostics step; None if train.diagnostics_every is 0."""


def compile_programs(
    config: ExperimentConfig, mesh: Mesh | None, traced: Any, params: Any, feed: Feed, clock: Clock, during: Show
) -> Programs:
    """Compile the steps of a run.

    Args:
      config: configuration of the run, in which model.remat is not `auto` (`remat_plan.resolve`).
      mesh: mesh of the run, or None.
      traced: train step from `trace_train_step`.
      params: parameters on the devices of the run.
      feed: batches of the run.
      clock: counts the seconds of each compilation.  The diagnostics step counts as `diagnostics_s`, the others as `compile_s`.
      during: shows that a program is being compiled, as `Display.during` does.
    """

    def compiled(name: str, trace: Callable[[], Any], options: dict[str, Any] | None = None) -> Any:
        part = "diagnostics_s" if name == "diagnostics" else "compile_s"
        with during(f"compiling the {name} step"), clock.timed(part):
            program = trace().lower().compile(options)
            distributed.barrier()
        return program

    def jitted(step: Callable) -> Any:
        return jax.jit(step, out_shardings=replicated(mesh))

    train = compiled("train", lambda: traced)
    held_out = feed.placed(feed.validation[0])
    validate = compiled("validation", lambda: jitted(make_eval_step(config)).trace(params, held_out))
    diagnose = None
    if config.train.diagnostics_every:
        # On a CPU the diagnostics step is not optimized, which halves its compilation time.  It runs only a few times.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        step = jitted(make_diagnostics_step(config))
        diagnose = compiled("diagnostics", lambda: step.trace(params, feed.diagnostic_tokens), quick)
    return Programs(train, validate, diagnose)
