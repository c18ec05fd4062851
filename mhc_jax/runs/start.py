"""The start of a run: what it needs before it compiles, and what it prints and records first."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mhc_jax import optim, user_functions
from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import connection_module, spec
from mhc_jax.cost import counts
from mhc_jax.data import Data, load_data, resolve_tokenizer
from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import read_json, write_json
from mhc_jax.parallel import distributed
from mhc_jax.parallel.sharding import make_mesh
from mhc_jax.runs.checkpoint import Checkpoints
from mhc_jax.runs.checksums import remove_summary
from mhc_jax.runs.environment import devices_of, environment, used_devices
from mhc_jax.runs.folder import differences, read_summary, recorded_data
from mhc_jax.runs.history import History
from mhc_jax.runs.metrics import MetricsWriter
from mhc_jax.runs.programs import abstract_state
from mhc_jax.runs.progress import Progress
from mhc_jax.runs.trackers import check_trackers
from mhc_jax.runs.warm_start import WarmStart
from mhc_jax.train_step import TrainState


def prepare(
    config: ExperimentConfig, data: Data | None, progress: Progress
) -> tuple[ExperimentConfig, Mesh | None, Data]:
    """Return (configuration with the settings of its tokenizer, mesh, data).  The text is read if `data` is None.

    The devices and the sizes of the text are printed.

    Raises:
      InputError: a tracker is not installed, the devices cannot run the dtype or form the mesh, or the text cannot be used.
    """
    distributed.on_every_process(lambda: check_trackers(config.train.trackers))
    # dot_product_attention asks for float16 products that accumulate in float32, which XLA's CPU backend does not have.
    if config.model.compute_dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError("model.compute_dtype is 'float16', which does not run on a CPU; use 'float32' or 'bfloat16'.")
    mesh = make_mesh(config.mesh)
    if data is None:
        data = distributed.on_every_process(lambda: load_data(config.data, progress.during))
    different = f"The processes read different texts from {config.data.source!r}; give all the same files."
    distributed.require_same(json.dumps([data.identity, data.tokenizer.fingerprint]), different)
    if user_functions.is_function(name := config.optimizer.name):
        rule = distributed.on_every_process(lambda: user_functions.identity("optimizer.name", name))
        different = f"The processes read different files for optimizer.name {name!r}; give all the same file."
        distributed.require_same(json.dumps(rule[1:]), different)
    for line in (f"devices: {used_devices(config)}", *data.describe(config.train.validation_batches)):
        progress.say(line)
    return resolve_tokenizer(config, data), mesh, data


def require_same_settings(settings: dict[str, Any]) -> None:
    """Raise `InputError` on all processes unless every process of the run was started with the same settings.

    Args:
      settings: configuration of the run on this process, as from `mapping.to_mapping`.
    """
    first, *others = map(json.loads, distributed.allgather_text(json.dumps(settings)))
    for process, other in enumerate(others, 1):
        changed = differences(first, other)
        require(
            not changed,
            f"Process {process} was started with other settings than process 0 ({'; '.join(changed[:6])}); start the same command "
            "on every process.",
        )


def sizes(config: ExperimentConfig, abstract: TrainState) -> list[str]:
    """Return lines about the sizes of the model and of the training, and about the groups of parameters in the optimizer.

    `abstract` has the shapes of the train state, and model.vocab_size of `config` is set.
    """
    parameters, of_connections = counts.parameter_counts(abstract.params)
    step = config.data.batch_size * config.data.sequence_length
    tokens = config.train.steps * step
    return [
        f"model: {parameters:,} parameters, {of_connections:,} of them in connections ({spec(config.model.connection)})",
        f"training: {config.train.steps:,} steps x {step:,} tokens = {tokens:,} tokens, {tokens / parameters:.3g} a parameter",
        *optim.table(_groups(config, abstract)),
    ]


def shapes_of_state(config: ExperimentConfig, mesh: Mesh | None) -> TrainState:
    """Return the shapes of the train state.

    Raises:
      InputError: the sizes are too large for int32 or for the memory.
    """
    try:
        abstract = abstract_state(config, mesh)
    except OverflowError as error:
        raise InputError("The sizes of the model are too large to count in int32; use a smaller model.") from error
    _require_room(config, abstract)
    return abstract


def _require_room(config: ExperimentConfig, abstract: TrainState) -> None:
    """Raise `InputError` if a train state of these shapes, or a batch, is larger than the memory of the devices together.

    The memory of CPU devices is that of the machine.  Whether a step fits is known only after it is compiled.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = stats["bytes_limit"] * config.mesh.size if "bytes_limit" in stats else machine * jax.process_count()
    state = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract) if hasattr(leaf, "dtype")
    )
    batch = 8 * config.data.batch_size * (config.data.sequence_length + 1)
    for what, size, settings in (
        (
            "The parameters and the state of the optimizer",
            state,
            "a smaller model (model.width, model.num_layers, ...)",
        ),
        ("A batch", batch, "a smaller data.batch_size"),
    ):
        require(
            size <= room,
            f"{what} would have {size / 1e9:,.0f} GB, and the memory has {room / 1e9:,.0f} GB; use {settings}, or more devices.",
        )


def _groups(config: ExperimentConfig, abstract: TrainState) -> list[optim.Group]:
    return optim.groups(abstract.params, config.optimizer, connection_module(config.model.connection))


@contextlib.contextmanager
def lost_process(checkpoints: Checkpoints, history: History, folder: Path) -> Iterator[None]:
    """Replace an error that a lost process caused by `ProcessLostError`, which says from which checkpoint the run can go on."""
    try:
        yield
    except Exception as error:
        if not distributed.is_lost_process(error):
            raise
        go_on = f" to go on from {checkpoints.newest() or 'the start'} in {folder}"
        raise distributed.process_lost_error(error, f", noticed at step {history.step}", go_on) from error


def forget_summary(folder: Path, progress: Progress) -> None:
    """Remove the summary and checksums that an interrupted run has left, before its metrics.jsonl changes."""
    if distributed.is_first_process():
        if read_summary(folder) is None and (folder / "summary.json").exists():
            progress.say("summary.json is damaged; it is written anew at the end")
        remove_summary(folder)


def record_start(
    folder: Path,
    config: ExperimentConfig,
    abstract: TrainState,
    data: Data,
    writer: MetricsWriter,
    progress: Progress,
    history: History,
    remarks: list[str],
    anew: bool,
    warm: WarmStart | None,
) -> None:
    """Write env.json for a new run, and print and log what the run starts from: other model, skipped checkpoints, step.

    env.json has the groups of parameters in the optimizer under `optimizer`.

    `remarks` has a sentence for each checkpoint that could not be read.  `anew` is whether the run has no checkpoint of its own.
    """
    env = environment() | devices_of(config)
    if distributed.is_first_process() and (anew or not _has_env(folder, progress)):
        source = {"init_from": warm.source} if warm else {}
        groups = [group._asdict() for group in _groups(config, abstract)]
        write_json(folder / "env.json", env | {"data": data.summary(), "optimizer": groups} | source)
    for remark in remarks:
        progress.say(f"{remark}.")
        writer.write("event", history.step, {"event": "checkpoint_skipped", "detail": remark})
    for remark in filter(None, (writer.remark, warm and warm.remark)):
        progress.say(remark)
    if not anew:
        progress.say(f"going on from the checkpoint of step {history.step}")
        resumed = {"event": "resumed", "commit": env["commit"], "device": env["device"], **devices_of(config)}
        writer.write("event", history.step, resumed)


def _has_env(folder: Path, progress: Progress) -> bool:
    """Return whether env.json is there and whole.  A damaged one is told."""
    try:
        return "commit" in read_json(folder / "env.json") and bool(recorded_data(folder))
    except InputError as error:
        if (folder / "env.json").exists():
            progress.say(f"env.json is damaged and written anew ({error})")
        return False
