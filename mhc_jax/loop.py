"""The training loop: dispatch step N, then read the metrics of step N-1.

A run folder holds config.json, env.json (of the start from step 0), metrics.jsonl, checkpoints/ and, when the run has ended,
summary.json.  Starting the same configuration on the same folder goes on from the newest checkpoint; the losses that
follow are bitwise those of a run that was never stopped (on CPU).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import connection_module
from mhc_jax.cost import counts
from mhc_jax.data import Data, load_data, resolve_vocabulary
from mhc_jax.diagnostics import STREAM_MEASURES, all_finite, summarize
from mhc_jax.errors import InputError
from mhc_jax.optim import describe
from mhc_jax.parallel import distributed
from mhc_jax.parallel.sharding import (
    batch_sharding,
    global_batch,
    local_rows,
    make_mesh,
    replicate,
    state_shardings,
    using,
)
from mhc_jax.remat_plan import resolve
from mhc_jax.runs.checkpoint import KEEP_CHECKPOINTS, Checkpoints, check_text, check_tokenizer
from mhc_jax.runs.environment import environment
from mhc_jax.runs.folder import check_run_folder, create_run_folder, recorded_data, write_json
from mhc_jax.runs.metrics import (
    SPIKE_THRESHOLD,
    SPIKE_WINDOW,
    MetricsWriter,
    NoWriter,
    SpikeDetector,
    check_trackers,
    plain,
)
from mhc_jax.runs.progress import NoProgress, RunProgress
from mhc_jax.runs.stop import StopRequest
from mhc_jax.train_step import init_state, make_diagnostics_step, make_eval_step, make_train_step, make_unstaged_step

EXIT_CODES = {"finished": 0, "diverged": 3, "interrupted": 130}

KEPT = (
    *("clock", "losses", "gains", "step_times", "validation_loss", "last_diagnostics"),
    *("diverged_at", "first_nonfinite", "compiled_bytes"),
)
"""What a checkpoint holds of a run beside its state, its place in the text and its spikes."""


def train(config: ExperimentConfig, folder: Path, label: str = "train", data: Data | None = None) -> dict[str, Any]:
    """Train one model into a run folder, or go on with it.

    Args:
      config: what to train.
      folder: the run folder.
      label: shown with the progress.
      data: loaded already, to share between the runs of a comparison.

    Returns:
      The summary that summary.json holds.

    Raises:
      InputError: anything a person can mend, before any compile where possible.
    """
    mapping = to_mapping(config)
    ended = distributed.on_every_process(lambda: check_run_folder(folder, mapping))
    if ended:
        if data is not None:
            check_text(recorded_data(folder), data.identity, folder)
        distributed.print_once(
            f"{label}: {folder} has {ended['status']} at step {ended['steps']} already; nothing to do."
        )
        return ended
    distributed.on_every_process(lambda: check_trackers(config.train.trackers))
    # dot_product_attention asks for F16_F16_F32 products, which XLA's CPU backend does not have.
    if config.model.compute_dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError("model.compute_dtype is 'float16', which does not run on a CPU; use 'float32' or 'bfloat16'.")
    mesh = make_mesh(config.mesh)
    data = distributed.on_every_process(lambda: load_data(config.data)) if data is None else data
    different = f"The processes read different texts from {config.data.source!r}; give all the same files."
    distributed.require_same(json.dumps([data.identity, data.tokenizer.fingerprint]), different)
    config = resolve_vocabulary(config, data)
    if planned := resolve(config)[1]:
        distributed.print_once(f"{label}: {planned}")
    create_run_folder(folder, mapping)
    checkpoints = Checkpoints(folder, KEEP_CHECKPOINTS)
    try:
        with using(mesh):
            summary = _Run(config, mapping, folder, label, data, checkpoints, mesh).run()
    except BaseException:
        if not distributed.is_multiprocess():  # to close is to wait for all
            checkpoints.close()
        raise
    checkpoints.close()
    return summary


class _Run:
    """State of one call of `train`."""

    def __init__(self, config, mapping, folder, label, data, checkpoints, mesh):
        self.config, self.mapping, self.folder, self.data = config, mapping, folder, data
        self.label, self.checkpoints, self.mesh = label, checkpoints, mesh
        self.clock = dict.fromkeys(("compile_s", "train_s", "validation_s", "diagnostics_s", "checkpoint_s"), 0.0)
        self.shape = (config.data.batch_size, config.data.sequence_length)
        self.rows = local_rows(mesh, self.shape) if distributed.is_multiprocess() else None
        self.replicated = NamedSharding(mesh, PartitionSpec()) if mesh else None
        self.agreement = distributed.Agreement(mesh)
        self.batches = data.train_iterator(rows=self.rows)
        self.validation = data.validation_batches(config.train.validation_batches, self.rows)
        self.bits_per_nat = data.bits_per_nat(config.train.validation_batches)
        # One held-out sequence, the same at every diagnostics step and in every run of a comparison.
        self.diagnostic_tokens: Any = data.validation_batches(1, np.arange(1))[0]["inputs"]
        self.done = 0
        self.step_times: list[float] = []
        self.losses: list[float] = []
        self.validation_loss: float | None = None
        self.last_diagnostics: dict[str, float | None] = {f"final_{key}": None for key in STREAM_MEASURES}
        self.gains: dict[str, float | None] = dict.fromkeys(
            ("max_composite_forward", "max_composite_backward", "max_column_error")
        )
        self.diverged_at: int | None = None
        self.first_nonfinite: int | None = None
        self.compiled_bytes: int | None = None
        self.peak_before = counts.device_peak()

    def run(self) -> dict[str, Any]:
        try:
            return self._run()
        except Exception as error:
            if distributed.is_lost_process(error):
                go_on = f" to go on from {self.checkpoints.newest() or 'the start'} in {self.folder}"
                raise distributed.process_lost_error(error, f", noticed at step {self.done}", go_on) from error
            raise

    def _run(self) -> dict[str, Any]:
        config, cfg = self.config, self.config.train
        # Where the state goes is said here: a checkpoint names the devices of the machine that wrote it.
        shapes = jax.eval_shape(lambda: init_state(self.config))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        own = state_shardings(self.mesh, shapes) if self.mesh else jax.tree.map(lambda _: here, shapes)
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, own)
        restored = self.checkpoints.restore_newest(abstract, to_mapping(self.config))
        if restored:
            self.state, loop, remarks = restored
            check_tokenizer(loop.get("tokenizer"), self.data.tokenizer.fingerprint, self.folder)
            check_text(loop.get("text", {}), self.data.identity, self.folder)
            self.batches.set_state(loop["data"])
            vars(self).update({name: loop[name] for name in KEPT})
        else:
            loop, remarks = {"spikes": None}, []
            init = jax.jit(lambda: init_state(self.config), out_shardings=own if self.mesh else None).lower().compile()
            distributed.barrier()
            self.state = init()
        self.done = int(self.state.step)
        self.spikes = SpikeDetector(SPIKE_WINDOW, SPIKE_THRESHOLD, loop["spikes"])
        placed = batch_sharding(self.mesh) if self.mesh else None
        example = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct(self.shape, np.int32, sharding=placed))
        self.tokens_per_step = math.prod(self.shape)
        began = time.perf_counter()
        results = (own, self.replicated) if self.mesh else None
        step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=results)
        self.train_step = step.trace(abstract, example)
        self.clock["compile_s"] += time.perf_counter() - began
        plain = (
            self.train_step if config.mesh.stage == 1 else jax.jit(make_unstaged_step(config)).trace(abstract, example)
        )
        self.flops_per_token = counts.jaxpr_flops(plain.jaxpr) / self.tokens_per_step
        env = environment()
        self.mesh_name = {"mesh": str(config.mesh)} if self.mesh else {}
        self.mesh_name |= {"processes": jax.process_count()} if distributed.is_multiprocess() else {}
        if distributed.is_first_process():
            if not restored or not (self.folder / "env.json").exists():
                write_json(self.folder / "env.json", {**env, **self.mesh_name, "data": self.data.summary()})
            keep = self.done if restored else -1
            self.writer = MetricsWriter(self.folder, keep, cfg.trackers, self.mapping)
            progress = RunProgress(self.label, cfg.steps, self.done)
            (self.folder / "summary.json").unlink(missing_ok=True)  # of an interruption; the run goes on
        else:
            self.writer, progress = NoWriter(), NoProgress()
        try:
            with progress as self.progress, StopRequest() as stop:
                for line in self.data.describe(cfg.validation_batches):
                    self.progress.say(line)
                for remark in remarks:
                    self.progress.say(f"{remark}.")
                    self.writer.write("event", self.done, {"event": "checkpoint_skipped", "detail": remark})
                if restored:
                    self.progress.say(f"going on from the checkpoint of step {self.done}")
                    event = {"event": "resumed", "commit": env["commit"], "device": env["device"], **self.mesh_name}
                    self.writer.write("event", self.done, event)
                status = self._steps(stop, anew=not restored)
        finally:
            self.writer.close()
            self.batches.close()
        return self._summary(status)

    def _placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch split over the mesh, of whose rows each process has read its own; as it is without a mesh."""
        if self.mesh is None:
            return batch
        if self.rows is None:
            return jax.device_put(batch, batch_sharding(self.mesh))
        return {name: global_batch(self.mesh, self.shape, self.rows, own) for name, own in batch.items()}

    def _compile(self, name: str, trace, compiler_options=None):
        self.progress.say(f"compiling the {name} step")
        began = time.perf_counter()
        compiled = trace().lower().compile(compiler_options)
        distributed.barrier()
        # What diagnostics cost is charged to them alone, their compile included.
        self.clock["diagnostics_s" if name == "diagnostics" else "compile_s"] += time.perf_counter() - began
        return compiled

    def _steps(self, stop: StopRequest, anew: bool) -> str:
        cfg = self.config.train
        if self.diverged_at is not None or self.done == cfg.steps:  # killed between the last checkpoint and the summary
            return "finished" if self.diverged_at is None else "diverged"
        step_fn = self._compile("train", lambda: self.train_step)
        self.compiled_bytes = counts.compiled_memory(step_fn)
        evaluate = jax.jit(make_eval_step(self.config), out_shardings=self.replicated)
        held_out = self._placed(self.validation[0])
        eval_fn = self._compile("validation", lambda: evaluate.trace(self.state.params, held_out))
        self._evaluate = lambda: [float(eval_fn(self.state.params, self._placed(b))) for b in self.validation]
        self._diagnose = None
        if cfg.diagnostics_every:
            if self.rows is not None and self.mesh is not None:
                self.diagnostic_tokens = replicate(self.mesh, self.diagnostic_tokens)
            args = (self.state.params, self.diagnostic_tokens)
            # It runs a few times on one sequence: on CPUs half the time to compile beats a faster program.
            quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
            step = jax.jit(make_diagnostics_step(self.config), out_shardings=self.replicated)
            self._diagnose = self._compile("diagnostics", lambda: step.trace(*args), quick)
        if anew:
            self.progress.say(
                describe(self.state.params, self.config.optimizer, connection_module(self.config.model.connection))
            )
            self._diagnostics(0, None)
            if self.first_nonfinite is not None:
                return self._diverged(0)

        pending: tuple[int, dict] | None = None
        number = 0
        self._mark = time.perf_counter()
        while self.done < cfg.steps and not (number := self.agreement.ask(int(stop.signal or 0))):
            self.state, metrics = step_fn(self.state, self._placed(next(self.batches)))
            self.done += 1
            if pending and not self._read(*pending):
                return self._diverged(pending[0])
            pending = (self.done, metrics)
            if self._is_pause(self.done):
                if not self._read(self.done, metrics) or not self._pause(metrics):
                    return self._diverged(self.done)
                pending = None
        if pending and not self._read(*pending):
            return self._diverged(pending[0])
        if self.done < cfg.steps:
            self.writer.write("event", self.done, {"event": "interrupted", "signal": number})
            self._save("interrupted")
            self.progress.say(
                f"stopped by signal {number} after step {self.done}; saved. Run the same command to go on."
            )
            return "interrupted"
        return "finished"

    def _is_pause(self, step: int) -> bool:
        cfg = self.config.train
        everies = (cfg.validate_every, cfg.checkpoint_every, cfg.diagnostics_every)
        return step == cfg.steps or any(every and step % every == 0 for every in everies)

    def _pause(self, metrics: dict) -> bool:
        """Validation, diagnostics and checkpoint, once the metrics of the step are known to be finite; False as `_read`."""
        cfg, step = self.config.train, self.done
        last = step == cfg.steps
        if last or (cfg.validate_every and step % cfg.validate_every == 0):
            began = time.perf_counter()
            self.validation_loss = float(np.mean(self._evaluate()))
            bits = self.validation_loss * self.bits_per_nat
            self.writer.write("validation", step, {"loss": self.validation_loss, "bits_per_byte": bits})
            self.clock["validation_s"] += time.perf_counter() - began
            self.first_nonfinite = None if math.isfinite(self.validation_loss) else step
        if cfg.diagnostics_every and (last or step % cfg.diagnostics_every == 0):
            self._diagnostics(step, metrics)
        if self.first_nonfinite is not None:
            return False
        if last or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
            self._save("last" if last else "periodic")
        self._mark = time.perf_counter()
        return True

    def _diagnostics(self, step: int, metrics: dict | None) -> None:
        if self._diagnose is None:
            return
        began = time.perf_counter()
        found = summarize(self._diagnose(self.state.params, self.diagnostic_tokens))
        record = plain(found)
        if metrics is not None:
            record["grad_norm_per_layer"] = plain(metrics["grad_norm_per_layer"])
            record |= {name: plain(value) for name, value in metrics.items() if name.startswith("router_")}
        self.writer.write("diagnostics", step, record)
        for key, before in self.gains.items():
            largest = float(np.max(np.nan_to_num(found[key.removeprefix("max_")], nan=np.inf)))
            self.gains[key] = largest if before is None else max(before, largest)
        self.last_diagnostics = {f"final_{key}": plain(np.mean(found[key])) for key in STREAM_MEASURES}
        self.clock["diagnostics_s"] += time.perf_counter() - began
        if not all(np.isfinite(found[key]).all() for key in ("stream_rms", "branch_rms")):
            self.first_nonfinite = step

    def _read(self, step: int, metrics: dict) -> bool:
        """Wait for a step's metrics and record them; False when the run has diverged."""
        cfg = self.config.train
        loss, norm, rate = (float(metrics[k]) for k in ("loss", "grad_norm", "learning_rate"))
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self.clock["train_s"] += elapsed
        self.step_times, self.losses = [*self.step_times, elapsed][-200:], [*self.losses, loss][-10:]
        tokens = self.tokens_per_step
        bad = not math.isfinite(loss) or not math.isfinite(norm)
        if bad or step % cfg.log_every == 0 or step == cfg.steps:
            clip = self.config.optimizer.grad_clip
            self.writer.write(
                "train",
                step,
                {
                    "loss": loss,
                    "grad_norm": norm,
                    "clipped": int(bool(clip) and norm > clip),
                    "learning_rate": rate,
                    "tokens": step * tokens,
                    "step_time_s": elapsed,
                    "tokens_per_s": tokens / elapsed,
                    **{name: float(np.mean(value)) for name, value in metrics.items() if name.startswith("router_")},
                },
            )
        if bad:
            self.first_nonfinite = step
            return False
        if self.spikes.update(step, loss):
            self.writer.write("event", step, {"event": "spike", "loss": loss, "median": self.spikes.median})
        self.progress.update(step, loss, tokens / elapsed)
        return True

    def _diverged(self, step: int) -> str:
        self.done = int(self.state.step)
        self.diverged_at = step
        self.writer.write("event", step, {"event": "diverged", "updates_saved": self.done})
        self._save("diverged")
        share = "all" if jax.jit(all_finite, out_shardings=self.replicated)(self.state) else "not all"
        self.progress.say(f"diverged at step {step}; the state of step {self.done} is saved, {share} of it finite.")
        return "diverged"

    def _save(self, reason: str) -> None:
        began = time.perf_counter()
        loop = {
            "data": self.batches.get_state(),
            "spikes": self.spikes.state(),
            **{name: getattr(self, name) for name in KEPT},
            "tokenizer": self.data.tokenizer.fingerprint,
            "text": self.data.identity,
        }
        self.checkpoints.save(self.done, self.state, loop, to_mapping(self.config), self.data.tokenizer.saved)
        if reason != "periodic":
            self.checkpoints.wait()
        self.clock["checkpoint_s"] += time.perf_counter() - began

    def _summary(self, status: str) -> dict[str, Any]:
        total, own = counts.parameter_counts(self.state.params)
        peak = counts.device_peak()
        finite = [x for x in self.losses if math.isfinite(x)]
        validated = self.validation_loss
        summary = {
            "status": status,
            "steps": self.done,
            **self.mesh_name,
            "parameters": total,
            "connection_parameters": own,
            "flops_per_token": self.flops_per_token,
            "step_time_s": statistics.median(self.step_times or [math.nan]),
            "peak_memory_bytes": peak if peak > self.peak_before else self.compiled_bytes,
            "train_loss": float(np.mean(finite)) if finite else None,
            "validation_loss": validated,
            "bits_per_byte": None if validated is None else validated * self.bits_per_nat,
            **self.gains,
            "gains_overflowed": math.inf in self.gains.values(),
            **self.last_diagnostics,
            "spikes": len(self.spikes.steps),
            "spike_steps": self.spikes.steps,
            "first_nonfinite_step": self.first_nonfinite,
            "wall_clock_s": sum(self.clock.values()),
            **self.clock,
        }
        if distributed.is_first_process():
            write_json(self.folder / "summary.json", summary)
        return plain(summary)
