"""Writes run folders with made-up but plausible numbers, for tests of records, plots and reports."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.analysis.run_reader import RunRecord, read_run
from mhc_jax.diagnostics import STREAM_MEASURES, backward_gain, composites, forward_gain, row_entropy

STEPS = 200
SUBLAYERS = 16
LOSS_OFFSET = {"residual": 0.0, "hc": -0.06, "mhc": -0.03}
"""Distance of the final losses from residual's, in nats/token."""


def write_run(
    root: Path,
    name: str,
    kind: str,
    *,
    seed: int = 0,
    diverged_at: int | None = None,
    streams: str = "differ",
    spikes: tuple[int, ...] = (),
    drop: tuple[str, ...] = (),
    n: int = 4,
    config: Mapping[str, Any] = {},
    results: Mapping[str, Any] = {},
) -> Path:
    """Write a run folder and return it.

    `drop` names keys to leave out of every line, `config` has settings by dotted key, and `results` numbers of the summary that
    replace those below.  `streams` is "differ" (the more, the deeper), "equal", or "opposite" (half of them one vector, half its
    negative).
    """
    folder = root / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, sum(map(ord, kind))])
    whole: dict[str, Any] = {
        "model": {"width": 64, "num_layers": SUBLAYERS // 2, "connection": {"kind": kind}},
        "data": {"source": "shakespeare", "seed": seed, "batch_size": 16, "sequence_length": 128},
        "optimizer": {"learning_rate": 3e-3, "grad_clip": 1.0, "warmup_steps": 0},
        "train": {"steps": STEPS, "seed": seed},
    }
    if kind != "residual":
        whole["model"]["connection"]["num_streams"] = n
    for key, value in config.items():
        *sections, leaf = key.split(".")
        functools.reduce(lambda inner, name: inner.setdefault(name, {}), sections, whole)[leaf] = value
    lines: list[dict[str, Any]] = []
    noise = np.random.default_rng(seed).normal(0, 0.05, STEPS)
    for step in range(2, (diverged_at or STEPS) + 1, 2):
        done = step / STEPS
        loss = 1.6 + 3.9 * np.exp(-6 * done) + LOSS_OFFSET[kind] * done + noise[step - 1]
        loss += 1.2 * (step in spikes)
        norm = np.exp(rng.normal(0, 0.2)) * (0.6 + 2 * np.exp(-8 * done)) * (1 + 9 * (kind == "hc"))
        lost = step == diverged_at
        train = {"kind": "train", "step": step, "loss": None if lost else loss, "grad_norm": None if lost else norm}
        train |= {"clipped": int(norm > 1), "learning_rate": 3e-3 * (1 - done), "tokens": step * 2048}
        lines.append(train | {"step_time_s": 0.1, "tokens_per_s": 20480.0})
        if step in spikes:
            lines.append({"kind": "event", "step": step, "event": "spike", "loss": loss})
        if step % 50 == 0:
            loss = 1.7 + 3.9 * np.exp(-6 * done) + LOSS_OFFSET[kind] * done
            bits = (1.7 + LOSS_OFFSET[kind]) / np.log(2)
            lines.append({"kind": "validation", "step": step, "loss": loss, "bits_per_byte": bits})
            lines.append(_diagnostics(kind, step, 1 if kind == "residual" else n, streams, rng))
    if diverged_at:
        lines.append({"kind": "event", "step": diverged_at, "event": "diverged"})
    parameters = {"residual": 400_000, "hc": 403_000, "mhc": 410_000}[kind]
    final = None if diverged_at else 1.7 + 3.9 * np.exp(-6) + LOSS_OFFSET[kind]
    last = next((line for line in reversed(lines) if line["kind"] == "diagnostics"), {})
    final_streams = {key: float(np.mean(last[key])) for key in STREAM_MEASURES if key in last}
    summary = {
        "status": "diverged" if diverged_at else "finished",
        "steps": diverged_at or STEPS,
        "parameters": parameters,
        "connection_parameters": parameters - 400_000,
        "flops_per_token": 2.4e6 + parameters,
        "step_time_s": {"residual": 0.1, "hc": 0.15, "mhc": 0.18}[kind],
        "peak_memory_bytes": None if kind == "hc" else 512 * 2**20,
        "train_loss": final,
        "validation_loss": final,
        "bits_per_byte": None if final is None else final / np.log(2),
        "max_composite_forward": {"residual": 1.0, "hc": 38.25, "mhc": 1.0}[kind],
        "max_composite_backward": {"residual": 1.0, "hc": 52.0, "mhc": 1.04}[kind],
        **{f"final_{key}": None if kind == "residual" else final_streams.get(key) for key in STREAM_MEASURES},
        "spikes": len(spikes),
        "spike_steps": list(spikes),
        "first_nonfinite_step": diverged_at,
        "wall_clock_s": 25.0,
        **results,
    }
    env = {"date": "2026-01-02 03:04", "command": f"python experiments/compare.py --seed {seed}", "commit": "0123abc"}
    env |= {"dirty": False, "device": "cpu", "versions": {"jax": "0.10.2"}}
    kept = [{k: v for k, v in line.items() if k not in drop} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for file, value in (("config", whole), ("env", env), ("summary", summary)):
        (folder / f"{file}.json").write_text(json.dumps(value))
    return folder


def _stream_measures(n: int, streams: str) -> dict[str, list[float]]:
    """Return the measures of streams of equal norm of which every pair has the same absolute cosine."""
    cosine = 1 - 0.3 * np.linspace(0, 1, SUBLAYERS) if streams == "differ" and n > 1 else np.ones(SUBLAYERS)
    signed = np.full(SUBLAYERS, -1 / (n - 1)) if streams == "opposite" and n > 1 else cosine
    return {
        "stream_cosine": signed.tolist(),
        "stream_cosine_abs": cosine.tolist(),
        "stream_rank": (n / (1 + (n - 1) * cosine**2)).tolist(),
    }


def make_run(root: Path, name: str, kind: str, **more: Any) -> RunRecord:
    """Write such a folder, and return what `read_run` reads of it."""
    return read_run(write_run(root, name, kind, **more))


def make_four(root: Path, streams: str = "equal") -> list[RunRecord]:
    """Write residual, HC with two spikes, mHC with such streams, and an HC in float16 that diverges at step 120."""
    return [
        make_run(root, "residual", "residual"),
        make_run(root, "hc", "hc", spikes=(90, 150)),
        make_run(root, "mhc", "mhc", streams=streams),
        make_run(root, "fp16", "hc", diverged_at=120, config={"model.dtype": "float16"}),
    ]


def _diagnostics(kind: str, step: int, n: int, streams: str, rng: np.random.Generator) -> dict[str, Any]:
    S = SUBLAYERS
    matrices = np.stack([np.eye(n)] * S)
    if kind == "hc":
        matrices = matrices + rng.normal(0, 0.1 * step / STEPS, (S, n, n))
        matrices = matrices + 0.18 * step / STEPS * np.eye(n)
    elif kind == "mhc":
        matrices = np.exp(np.eye(n) * 4 + rng.normal(0, 0.8 * step / STEPS, (S, n, n)))
        for _ in range(20):
            matrices /= matrices.sum(1, keepdims=True)
            matrices /= matrices.sum(2, keepdims=True)
    up, down = composites(matrices)
    forward, backward = forward_gain(up), backward_gain(down)
    home = np.arange(S) % n
    pre = np.full((S, n), 0.05)
    pre[np.arange(S), home] = 0.95
    depth = np.linspace(0, 1, S)
    return {
        "kind": "diagnostics",
        "step": step,
        "single_forward": forward_gain(matrices).tolist(),
        "single_backward": backward_gain(matrices).tolist(),
        "composite_forward": forward.tolist(),
        "composite_backward": backward.tolist(),
        "composite_forward_max": (forward**1.2).tolist(),
        "composite_backward_max": (backward**1.2).tolist(),
        "composite_mean_forward": forward.tolist(),
        "composite_mean_backward": backward.tolist(),
        "row_error": np.abs(matrices.sum(2) - 1).max(1).tolist(),
        "column_error": np.abs(matrices.sum(1) - 1).max(1).tolist(),
        "entropy": row_entropy(matrices).tolist(),
        "uniform_distance": np.linalg.norm(up - 1 / n, axis=(1, 2)).tolist(),
        "h_res": matrices.tolist(),
        "h_pre": (np.ones((S, 1)) if n == 1 else pre).tolist(),
        "h_post": (1 + 0.1 * rng.normal(size=(S, n))).tolist(),
        **_stream_measures(n, streams),
        "stream_rms": (1 + 5 * depth[:, None] * rng.uniform(0.7, 1.3, (S, n))).tolist(),
        "branch_rms": (0.5 + depth).tolist(),
        "grad_norm_per_layer": (0.1 * np.exp(rng.normal(0, 0.2, S // 2))).tolist(),
    }


def legend_texts(figure):
    """Names in the first legend of a figure."""
    return [text.get_text() for text in figure.legends[0].get_texts()]
