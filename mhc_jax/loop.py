"""The training loop: dispatch step N, then read the metrics of step N-1.

A run folder holds config.json, env.json (written when the run starts at step 0), metrics.jsonl and checkpoints/, and summary.json
once the run has ended or was interrupted.  If `train` is called again with the same configuration and folder, the run goes on from
the newest checkpoint.  On a CPU its losses are bitwise the losses of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.cost import counts
from mhc_jax.data import Data, load_data
from mhc_jax.diagnostics import all_finite, summarize
from mhc_jax.parallel import distributed
from mhc_jax.parallel.sharding import using
from mhc_jax.remat_plan import resolve
from mhc_jax.runs.checkpoint import KEEP_CHECKPOINTS, Checkpoints, check_text, check_tokenizer, saved_steps
from mhc_jax.runs.checksums import write_summary
from mhc_jax.runs.folder import check_run_folder, recorded_data, respelled, run_folder
from mhc_jax.runs.history import History, summary_of
from mhc_jax.runs.lock import require_free
from mhc_jax.runs.metrics import MetricsWriter, plain
from mhc_jax.runs.programs import (
    Feed,
    Programs,
    compile_programs,
    first_state,
    flops_per_token,
    replicated,
    trace_train_step,
)
from mhc_jax.runs.progress import Progress
from mhc_jax.runs.start import (
    forget_summary,
    lost_process,
    prepare,
    record_start,
    require_same_settings,
    shapes_of_state,
    sizes,
)
from mhc_jax.runs.stop import StopRequest, signal_name
from mhc_jax.runs.warm_start import warm_start
from mhc_jax.train_step import TrainState

EXIT_CODES = {"finished": 0, "diverged": 3, "interrupted": 130}


class DivergedError(Exception):
    """Raised when a train step, a validation or a diagnostics step gives a number that is not finite."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Run:
    """The objects of one run that the functions of this module share and do not replace."""

    config: ExperimentConfig
    data: Data
    feed: Feed
    mesh: Mesh | None
    programs: Programs
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress


# ---------------------------------------------------------------------------------------------------------------- a run


def train(config: ExperimentConfig, folder: Path, label: str = "train", data: Data | None = None) -> dict[str, Any]:
    """Train one model into a run folder, or go on with the run that the folder holds.

    Args:
      config: configuration of the run.
      folder: the run folder.
      label: name of the run in progress lines.
      data: training and validation text that the caller has loaded.  None means that config.data is loaded here.

    Returns:
      The content of summary.json.

    Raises:
      Busy: another process trains this run.
      InputError: a setting, a file or a folder cannot be used.  It is raised before any compilation if possible.
    """
    mapping = to_mapping(config)
    require_same_settings(mapping)
    if ended := distributed.on_every_process(lambda: check_run_folder(folder, mapping)):
        if data is None and respelled(folder, mapping):
            data = distributed.on_every_process(lambda: load_data(config.data))
        if data is not None:
            check_data(folder, data)
        distributed.print_once(
            f"{label}: {folder} has {ended['status']} at step {ended.get('steps')} already; nothing to do."
        )
        return ended
    distributed.on_every_process(lambda: require_free(folder) if distributed.is_first_process() else None)
    with Progress(label, "step", config.train.steps, None, shown=distributed.is_first_process()) as progress:
        return _train(config, folder, data, progress)


def _train(config: ExperimentConfig, folder: Path, data: Data | None, progress: Progress) -> dict[str, Any]:
    """Train as `train` says, and show what is being done."""
    mapping = to_mapping(config)
    config, mesh, data = prepare(config, data, progress)
    if respelled(folder, mapping):
        check_data(folder, data)
    planned, plan = resolve(config)
    if plan:
        progress.say(plan)
    warm = None
    if config.train.init_from and not saved_steps(folder / "checkpoints"):
        with using(mesh), progress.during(f"loading {config.train.init_from}"):
            warm = warm_start(config, mesh, data)
    # Shapes come before the folder, because a function that optimizer.name names may fail.
    with using(mesh):
        abstract = distributed.on_every_process(lambda: shapes_of_state(config, mesh))
    cfg, history = config.train, History()
    peak_before = counts.device_peak()
    with (
        run_folder(folder, mapping) as ended,
        Checkpoints(folder, KEEP_CHECKPOINTS) as checkpoints,
        using(mesh),
        lost_process(checkpoints, history, folder),
    ):
        if ended:
            return ended
        feed = Feed(data, config, mesh)
        for line in sizes(config, abstract):
            progress.say(line)
        if restored := checkpoints.restore_newest(abstract, to_mapping(config)):
            state, saved, remarks = restored
            check_tokenizer(saved["tokenizer"], data.tokenizer.fingerprint, folder)
            check_text(saved["text"], data.identity, folder)
            feed.train.set_state(saved["data"])
            history.restore(saved["history"])
        elif warm is not None:
            state, remarks, history.step = warm.state, [], warm.step
            if warm.data_state is not None:
                feed.train.set_state(warm.data_state)
        else:
            with progress.during("making the first state"):
                state, remarks = first_state(config, mesh, abstract), []
        anew = restored is None
        measured = restored[1].get("measured", "") if restored else ""
        with progress.during("tracing the train step"), history.clock.timed("compile_s"):
            traced = trace_train_step(planned, mesh, abstract)
        flops = flops_per_token(planned, mesh, abstract, traced)
        forget_summary(folder, progress)
        with (
            contextlib.closing(feed.train),
            MetricsWriter(folder, -1 if anew else history.step, cfg.trackers, mapping, measured) as writer,
            StopRequest(progress.say) as stop,
        ):
            record_start(folder, config, abstract, data, writer, progress, history, remarks, anew, warm)
            # A run that has ended trains no further.  It only lacks its summary.json, which is written below.
            if history.ended(cfg.steps) is None:
                programs = compile_programs(planned, mesh, traced, state.params, feed, history.clock, progress.during)
                history.compiled_bytes = counts.compiled_memory(programs.train)
                run = Run(config, data, feed, mesh, programs, checkpoints, writer, progress)
                state = run_steps(run, state, history, stop, anew)
        summary = summary_of(config, state, history, flops, feed.bits_per_nat, peak_before)
        if distributed.is_first_process():
            write_summary(folder, plain(summary))
    return plain(summary)


def check_data(folder: Path, data: Data) -> None:
    """Raise `InputError` unless the text and the tokenizer are those that a run folder has recorded, if it has."""
    recorded = recorded_data(folder)
    check_text(recorded, data.identity, folder)
    check_tokenizer(recorded.get("fingerprint", data.tokenizer.fingerprint), data.tokenizer.fingerprint, folder)


# ------------------------------------------------------------------------------------------------------------- the loop


def run_steps(run: Run, state: TrainState, history: History, stop: StopRequest, anew: bool) -> TrainState:
    """Train until the last step, a divergence or a signal.

    The metrics of a step are read while the next step runs.  Before validation, diagnostics or a checkpoint, all metrics are read.

    Args:
      run: the objects that the functions of the loop share.
      state: train state after history.step updates.  Its arrays are donated, so they cannot be used afterwards.
      history: measurements of the run so far, which this function updates.
      stop: once its `signal` is not None, the run saves its state and ends.
      anew: whether the run has no checkpoint of its own yet.

    Returns:
      The train state after the last step, which is saved as a checkpoint, too.
    """
    cfg = run.config.train
    # Each pair is (k, hook).  Hooks run every k steps and after the last step, in this order and before a checkpoint is saved.
    hooks = (
        (cfg.validate_every, validate),
        (cfg.diagnostics_every, diagnose),
    )
    agreement, signal = distributed.Agreement(run.mesh), 0
    unread = deque()  # (step, metrics) of dispatched steps whose metrics are not yet read
    try:
        if anew:
            diagnose(run, state, history, None)
            stop_if_not_finite(history)
        run.progress.begin(history.step)
        history.clock.restart_step()
        while history.step < cfg.steps and not (signal := agreement.ask(int(stop.signal or 0))):
            state, metrics = run.programs.train(state, run.feed.placed(next(run.feed.train)))
            history.step += 1
            unread.append((history.step, metrics))
            due = [hook for every, hook in hooks if is_due(every, history.step, cfg.steps)]
            saving = is_due(cfg.checkpoint_every, history.step, cfg.steps)
            while len(unread) > (0 if due or saving else 1):
                read(run, history, *unread.popleft())
            for hook in due:
                hook(run, state, history, metrics)
            stop_if_not_finite(history)
            if saving:
                save(run, state, history, wait=history.step == cfg.steps)
            if due or saving:
                history.clock.restart_step()
        while unread:
            read(run, history, *unread.popleft())
    except DivergedError as divergence:
        end_diverged(run, state, history, divergence.step)
    else:
        if history.step < cfg.steps:
            end_interrupted(run, state, history, signal)
    return state


def is_due(every: int, step: int, last: int) -> bool:
    """Return whether a hook or a checkpoint is due after `step`: every `every` steps (0: never), and after step `last`."""
    return step == last or (every > 0 and step % every == 0)


def read(run: Run, history: History, step: int, metrics: dict[str, Any]) -> None:
    """Wait for the metrics of a train step, and write them to the history, metrics.jsonl and the progress display.

    Raises:
      DivergedError: the loss or the norm of the gradient is not finite.
    """
    cfg, clip = run.config.train, run.config.optimizer.grad_clip
    loss, norm, rate = (float(metrics[key]) for key in ("loss", "grad_norm", "learning_rate"))
    seconds = history.add_step(loss)
    tokens = run.config.data.batch_size * run.config.data.sequence_length
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not finite or is_due(cfg.log_every, step, cfg.steps):
        values = {
            "loss": loss,
            "grad_norm": norm,
            "clipped": int(bool(clip) and norm > clip),
            "learning_rate": rate,
            "tokens": step * tokens,
            "step_time_s": seconds,
            "tokens_per_s": tokens / seconds,
            **{name: float(np.mean(value)) for name, value in router_numbers(metrics).items()},
        }
        run.writer.write("train", step, values)
    if not finite:
        history.first_nonfinite = step
        raise DivergedError(step)
    if history.spikes.update(step, loss):
        run.writer.write("event", step, {"event": "spike", "loss": loss, "median": history.spikes.median})
    run.progress.advance(1, f"loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s")


def router_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that describe routers, by name.  Each is an array [M] over the M blocks with experts."""
    return {name: value for name, value in metrics.items() if name.startswith("router_")}


def validate(run: Run, state: TrainState, history: History, _metrics: dict[str, Any]) -> None:
    """Measure the mean loss over the validation batches, and write it to the history and metrics.jsonl."""
    with history.clock.timed("validation_s"):
        losses = [float(run.programs.validate(state.params, run.feed.placed(batch))) for batch in run.feed.validation]
        loss = float(np.mean(losses))
        history.add_validation(loss)
        values = {"loss": loss, "bits_per_byte": loss * run.feed.bits_per_nat}
        run.writer.write("validation", history.step, values)


def diagnose(run: Run, state: TrainState, history: History, metrics: dict[str, Any] | None) -> None:
    """Measure gains, marginals and streams on a held-out sequence, unless train.diagnostics_every is 0.

    `metrics` are those of the last train step, or None before the first step.
    """
    if run.programs.diagnose is None:
        return
    with history.clock.timed("diagnostics_s"):
        values = summarize(run.programs.diagnose(state.params, run.feed.diagnostic_tokens))
        record = dict(values)
        if metrics is not None:
            record |= {"grad_norm_per_layer": metrics["grad_norm_per_layer"], **router_numbers(metrics)}
        run.writer.write("diagnostics", history.step, record)
        history.add_diagnostics(values)


def stop_if_not_finite(history: History) -> None:
    """Raise `DivergedError` if the history notes a number that is not finite."""
    if history.first_nonfinite is not None:
        raise DivergedError(history.step)


def save(run: Run, state: TrainState, history: History, wait: bool, replace: bool = False) -> None:
    """Start saving a checkpoint.  With `wait` return only when the checkpoint is on disk.

    With `replace` a checkpoint of the same step is replaced.
    """
    with history.clock.timed("checkpoint_s"):
        loop = {
            "data": run.feed.train.get_state(),
            "history": history.saved(),
            "tokenizer": run.data.tokenizer.fingerprint,
            "text": run.data.identity,
            "measured": run.writer.measured,
        }
        config = to_mapping(run.config)
        run.checkpoints.save(history.step, state, loop, config, run.data.tokenizer.saved, replace)
        if wait:
            run.checkpoints.wait()


def end_diverged(run: Run, state: TrainState, history: History, step: int) -> None:
    """Record that the run diverged at `step`, and save the state.  A step whose loss is not finite has not changed the state."""
    history.step, history.diverged_at = int(state.step), step
    run.writer.write("event", step, {"event": "diverged", "updates_saved": history.step})
    # A periodic checkpoint of this step does not know of the divergence.
    save(run, state, history, wait=True, replace=True)
    share = "all" if jax.jit(all_finite, out_shardings=replicated(run.mesh))(state) else "not all"
    run.progress.say(f"diverged at step {step}; the state of step {history.step} is saved, {share} of it finite.")


def end_interrupted(run: Run, state: TrainState, history: History, signal: int) -> None:
    """Record that the signal with number `signal` stopped the run, and save the state."""
    run.writer.write("event", history.step, {"event": "interrupted", "signal": signal})
    save(run, state, history, wait=True)
    run.progress.say(
        f"stopped by {signal_name(signal)} after step {history.step}; saved. Run the same command to go on."
    )
