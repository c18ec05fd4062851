"""Run folders, read back: config, environment, metrics and summary as plain values and arrays.

Letters: K lines of one sort in metrics.jsonl, S sub-layers (attention and feed-forward count as
two), n streams.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec_of_mapping
from mhc_jax.errors import InputError, one_of, require

MEASUREMENTS = ("train", "validation", "diagnostics")
SEED_KEYS = ("train.seed", "data.seed")
NEUTRAL_KEYS = ("train.checkpoint_every", "train.trackers")
"""Settings that change no number of a run; with the sections `mesh` and `pipeline`, which change rounding alone."""
SHORT = {
    "optimizer.learning_rate": "lr",
    "model.num_layers": "layers",
    "train.seed": "trainseed",
    "data.seed": "dataseed",
}
"""Names of settings in labels and run folders; any other key goes by its last part."""
REDONE_EVENTS = ("spike", "diverged")
"""Events of steps past the one a run resumed from; those steps were done again."""
ABSENT = "(absent)"
"""Stands for a setting that a run's config lacks; each kind of connection has its own settings."""


@dataclass(frozen=True)
class RunRecord:
    """One run folder.

    JSON null (a NaN or an infinity of the run) is NaN here.  After a
    `resumed` event the lines of the steps that were done again replace the earlier ones.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    """Nested, as `mapping.to_mapping` wrote it."""
    env: Mapping[str, Any]
    """Free form: device, versions, commit; empty when the folder has none."""
    summary: Mapping[str, Any] | None
    """None while the run goes on, or when it was killed."""
    train: Mapping[str, Float[np.ndarray, " K"]]
    """Columns `step`, `loss` (nats/token), ...; NaN where a line lacks the key."""
    validation: Mapping[str, Float[np.ndarray, " V"]]
    diagnostics: Sequence[Mapping[str, Any]]
    """One mapping a line: `step` (int) and arrays [S, ...]."""
    events: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """Kind of the connection: `residual`, `hc`, `mhc`, ..."""
        return self.config["model"]["connection"]["kind"]

    @property
    def connection(self) -> str:
        """The connection as `connections.spec` spells it, with its init and every setting that is not the kind's default."""
        return spec_of_mapping(self.config["model"]["connection"])

    @property
    def seed(self) -> tuple[int, int]:
        """(train.seed, data.seed)."""
        return self.config["train"].get("seed", 0), self.config["data"].get("seed", 0)

    @property
    def status(self) -> str:
        """`finished`, `diverged` or `interrupted`; `no summary` while running or after a kill."""
        return self.result("status") or ("no summary" if self.diverged_at is None else "diverged")

    @property
    def diverged_at(self) -> int | None:
        """Step of the first non-finite loss, or of the `diverged` event; None without either."""
        steps = [e["step"] for e in self.events if e.get("event") == "diverged"]
        first = self.result("first_nonfinite_step")
        return int(first) if first is not None else (int(steps[0]) if steps else None)

    @property
    def spike_steps(self) -> list[int]:
        """Steps of loss spikes, from the summary, else from the events."""
        steps = self.result("spike_steps")
        if steps is None:
            steps = [e["step"] for e in self.events if e.get("event") == "spike"]
        return sorted({int(step) for step in steps})

    @property
    def num_streams(self) -> int:
        """n, as seen in the diagnostics, else as configured; 1 for a connection without streams."""
        last = last_diagnostics(self, "h_pre") or last_diagnostics(self, "h_res")
        if last is not None:
            return int(last[1].shape[-1])
        return int(self.config["model"]["connection"].get("num_streams", 1))

    @property
    def tokens(self) -> int | None:
        """Tokens trained on, steps x batch x sequence length; None without a summary."""
        data, steps = self.config["data"], self.result("steps")
        return None if steps is None else int(steps) * data["batch_size"] * data["sequence_length"]

    def result(self, key: str) -> Any:
        """Value of `key` in summary.json; None when there is no summary or no such key."""
        return None if self.summary is None else self.summary.get(key)


def read_run(folder: str | Path, metrics: bool = True) -> RunRecord:
    """Read a run folder.

    A last line of metrics.jsonl that is no JSON was being written when the process was killed, and
    is left out.

    Args:
      folder: the run's.
      metrics: read metrics.jsonl; without it the run has its summary and no curves.

    Raises:
      InputError: no such folder; no config.json or metrics.jsonl in it; a file that does not parse.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a run.")
    for file in ("config.json", "metrics.jsonl") if metrics else ("config.json",):
        require(
            (folder / file).is_file(),
            f"{str(folder)!r} is not a run folder: it has no {file}; give a folder that a training run wrote.",
        )
    config = _read_mapping(folder / "config.json")
    kind = flatten(config).get("model.connection.kind")
    require(
        isinstance(kind, str),
        f"{str(folder / 'config.json')!r} has no model.connection.kind; it is not the config of a run.",
    )
    lines = _read_lines(folder / "metrics.jsonl") if metrics else {kind: [] for kind in (*MEASUREMENTS, "event")}
    env, summary = folder / "env.json", folder / "summary.json"
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        env=_read_mapping(env) if env.is_file() else {},
        summary=_read_mapping(summary) if summary.is_file() else None,
        train=_columns(lines["train"]),
        validation=_columns(lines["validation"]),
        diagnostics=lines["diagnostics"],
        events=lines["event"],
    )


def series(record: RunRecord, kind: str, key: str) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, "K ..."]]:
    """Steps and values of one measurement, in order of steps; both empty when no line has the key.

    Args:
      record: the run.
      kind: `train`, `validation` or `diagnostics`.
      key: e.g. `loss` (values [K]) or `composite_forward` (values [K, S]).
    """
    one_of("kind", kind, MEASUREMENTS)
    if kind == "diagnostics":
        found = [(d["step"], d[key]) for d in record.diagnostics if d.get(key) is not None]
        steps, values = [s for s, _ in found], [v for _, v in found]
        return np.asarray(steps, int), np.stack(values) if values else np.empty(0)
    columns = record.train if kind == "train" else record.validation
    if key not in columns:
        return np.empty(0, int), np.empty(0)
    return columns["step"].astype(int), columns[key]


def last_diagnostics(record: RunRecord, key: str) -> tuple[int, Float[np.ndarray, "S ..."]] | None:
    """Step and value of the last diagnostics line with a finite number in `key`, or None."""
    for line in reversed(record.diagnostics):
        if line.get(key) is not None and np.isfinite(line[key]).any():
            return line["step"], line[key]
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: {"model": {"width": 8}} becomes {"model.width": 8}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def identity(config: Mapping[str, Any], neutral: bool = False) -> dict[str, Any]:
    """What a run is, but for its seeds: `connection` (its spec), and every other setting that its numbers depend on.

    Args:
      config: nested, as `mapping.to_mapping` wrote it.
      neutral: with the settings that change no number.
    """
    dropped = () if neutral else NEUTRAL_KEYS
    sections = ("model.connection.",) if neutral else ("model.connection.", "mesh.", "pipeline.")
    kept = {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith(sections) and key not in (*SEED_KEYS, *dropped)
    }
    return {"connection": spec_of_mapping(config["model"]["connection"]), **kept}


def identities(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """`identity` of each run and, where all runs recorded it, of its training text (`text`, start of a hash).

    Where runs differ in neutral settings alone, as in a sweep over meshes, these belong to it too.
    """
    texts = [flatten(record.env).get("data.train_sha256") for record in records]
    of_text = [{"text": text[:8]} if None not in texts else {} for text in map(str, texts)]
    found = [identity(record.config) | text for record, text in zip(records, of_text, strict=True)]
    if len({(json.dumps(one, sort_keys=True), r.seed) for one, r in zip(found, records, strict=True)}) < len(records):
        return [identity(r.config, neutral=True) | text for r, text in zip(records, of_text, strict=True)]
    return found


def not_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings outside the connection and the seeds that differ from the project's defaults; dotted key to value."""
    defaults = flatten(to_mapping(ExperimentConfig()))
    return {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith("model.connection.") and key not in SEED_KEYS and value != defaults.get(key, ABSENT)
    }


def paired_gap(
    record: RunRecord, baseline: RunRecord, kind: str
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Steps that both runs logged, and `record` minus `baseline` in loss (nats/token) there.

    Below 0 means that `record` has the lower loss.

    Args:
      record, baseline: two runs.
      kind: `train` or `validation`.
    """
    steps, loss = series(record, kind, "loss")
    base_steps, base_loss = series(baseline, kind, "loss")
    common, i, j = np.intersect1d(steps, base_steps, return_indices=True)
    return common, loss[i] - base_loss[j]


def seed_name(seed: tuple[int, int]) -> str:
    """`seed 1`, or `seeds 0/1` of training and data where they differ."""
    return f"seed {seed[0]}" if seed[0] == seed[1] else f"seeds {seed[0]}/{seed[1]}"


def labels(records: Sequence[RunRecord], seeds: bool = True) -> list[str]:
    """One name a run: its connection, the other settings in which the runs differ, and its seeds where they differ.

    Runs of one folder name and the same settings are told apart by primes.

    Args:
      records: the runs.
      seeds: name the seeds.
    """
    found = identities(records)
    keys = [key for key in dict.fromkeys(key for one in found for key in one) if key != "connection"]
    varying = [key for key in keys if len({json.dumps(one.get(key, ABSENT)) for one in found}) > 1]
    several = seeds and len({record.seed for record in records}) > 1
    out: list[str] = []
    for record, one in zip(records, found, strict=True):
        words = [f"{SHORT.get(key, key.rpartition('.')[2])}={_word(one[key])}" for key in varying if key in one]
        label = " ".join([one["connection"], *words, *([seed_name(record.seed)] if several else [])])
        while seeds and label in out:
            label += "'"
        out.append(label)
    return out


def _word(value: Any) -> str:
    return ("+".join(map(str, value)) or "none") if isinstance(value, list) else f"{value}"


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON ({error}); restore it.") from error
    require(
        isinstance(value, dict),
        f"{str(path)!r} must hold a JSON object; restore it.",
    )
    return value


def _read_lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines by kind, those of one kind in order of steps; diagnostics have arrays for lists."""
    lines: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in MEASUREMENTS}
    events: list[dict[str, Any]] = []
    raw = [(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for number, text in raw:
        try:
            line = json.loads(text)
            kind, step = line["kind"], int(line["step"])
            if kind == "diagnostics":
                arrays = {k: v for k, v in line.items() if isinstance(v, list)}
                line |= {k: np.asarray(v, float) for k, v in arrays.items()}
        except (ValueError, TypeError, KeyError) as error:
            if number == raw[-1][0]:
                break
            raise InputError(
                f"Line {number} of {str(path)!r} is not a JSON object with kind and step ({error}); remove that line."
            ) from error
        if kind == "event":
            if line.get("event") == "resumed":
                undone = [e for e in events if e["step"] > step and e.get("event") in REDONE_EVENTS]
                events = [e for e in events if e not in undone]
                lines = {k: {s: v for s, v in by.items() if s <= step} for k, by in lines.items()}
            events.append(line)
        elif kind in lines:
            lines[kind][step] = line
    return {k: [by[step] for step in sorted(by)] for k, by in lines.items()} | {"event": events}


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Float[np.ndarray, " K"]]:
    """Columns of the numeric keys; null and missing are NaN."""
    keys = sorted({k for line in lines for k, v in line.items() if isinstance(v, int | float)} | {"step"})
    return {key: np.asarray([line.get(key) for line in lines], float) for key in keys}
