"""Read run folders: configuration, environment, metrics and summary as plain values and arrays.

Letters: K is the number of train lines of metrics.jsonl, V of its validation lines, L of sub-layers, and n of streams.
"""

from __future__ import annotations

import json
import os
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
from mhc_jax.files.json_files import read_json
from mhc_jax.runs.checksums import require_whole
from mhc_jax.runs.folder import NEUTRAL_KEYS, NEUTRAL_SECTIONS, TEXT_KEYS, read_summary

MEASUREMENTS = ("train", "validation", "diagnostics")
SEED_KEYS = ("train.seed", "data.seed")
SHORT = {
    "optimizer.learning_rate": "lr",
    "optimizer.name": "optimizer",
    "model.num_layers": "layers",
    "train.seed": "trainseed",
    "data.seed": "dataseed",
}
"""Short names of settings in labels and in names of run folders.  Other settings have the last part of their key as short name."""
CONTENT_KEYS = ("train_sha256", "validation_sha256", "fingerprint")
"""Keys of the entry `data` of env.json that tell the content of the texts and of the tokenizer."""
ABSENT = "(absent)"
"""Text that stands for the value of a setting that a run does not have.  Kinds of connection have different settings."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, or what a record keeps of it.

    JSON null, which stands for NaN and infinity in metrics.jsonl, is NaN in columns and arrays.
    """

    name: str
    folder: Path
    """The run folder.  A run of a record has the path `RECORD/name`, which tells it from other runs; there is no folder."""
    config: Mapping[str, Any]
    """Configuration of the run as a nested mapping, as `mapping.to_mapping` wrote it."""
    env: Mapping[str, Any]
    """Content of env.json: device, versions, commit and the like.  Empty if the folder has no env.json."""
    summary: Mapping[str, Any] | None
    """Content of summary.json.  None if the run is still going on or was killed, because it writes the file at its end."""
    train: Mapping[str, Float[np.ndarray, " K"]]
    """Columns of the train lines of metrics.jsonl: `step`, `loss` (nats/token) and others.  Values that a line lacks are NaN."""
    validation: Mapping[str, Float[np.ndarray, " V"]]
    diagnostics: Sequence[Mapping[str, Any]]
    """A mapping for each diagnostics line of metrics.jsonl, with `step` (int) and arrays over depth, such as h_res [L, n, n]."""
    events: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """Kind of the connection: `residual`, `hc`, `mhc`, ..."""
        return self.config["model"]["connection"]["kind"]

    @property
    def connection(self) -> str:
        """Text of the connection, such as `mhc:init=paper`: its kind, its init and every setting that is not the kind's default."""
        return spec_of_mapping(self.config["model"]["connection"])

    @property
    def seed(self) -> tuple[int, int]:
        """The seeds of the run: (train.seed, data.seed)."""
        return self.config["train"].get("seed", 0), self.config["data"].get("seed", 0)

    @property
    def status(self) -> str:
        """How the run ended: `finished`, `diverged` or `interrupted`.  `no summary` means that it still runs or was killed."""
        return self.result("status") or ("no summary" if self.diverged_at is None else "diverged")

    @property
    def diverged_at(self) -> int | None:
        """Step of the first number that was not finite, from the summary, or else the step of the `diverged` event, or None."""
        steps = [e["step"] for e in self.events if e.get("event") == "diverged"]
        first = self.result("first_nonfinite_step")
        return int(first) if first is not None else (int(steps[0]) if steps else None)

    @property
    def spike_steps(self) -> list[int]:
        """Steps of the run's loss spikes, from the summary or, without a summary, from the events of metrics.jsonl."""
        steps = self.result("spike_steps")
        if steps is None:
            steps = [e["step"] for e in self.events if e.get("event") == "spike"]
        return sorted({int(step) for step in steps})

    @property
    def num_streams(self) -> int:
        """Number n of streams, from the diagnostics or, without diagnostics, from the configuration.

        It is 1 for a connection without streams.
        """
        last = last_diagnostics(self, "h_pre") or last_diagnostics(self, "h_res")
        if last is not None:
            return int(last[1].shape[-1])
        return int(self.config["model"]["connection"].get("num_streams", 1))

    @property
    def tokens(self) -> int | None:
        """Number of tokens that the run trained on: steps x batch x sequence length.  None without a summary."""
        data, steps = self.config["data"], self.result("steps")
        return None if steps is None else int(steps) * data["batch_size"] * data["sequence_length"]

    def result(self, key: str) -> Any:
        """Return the value of `key` in summary.json, or None if the run has no summary or the summary no such key."""
        return None if self.summary is None else self.summary.get(key)


def read_run(folder: str | Path, metrics: bool = True) -> RunRecord:
    """Read a run folder.

    If the last line of metrics.jsonl is not JSON, it is left out, because the process was killed while it wrote the line.

    Args:
      folder: the run folder.
      metrics: whether to read metrics.jsonl.  If not, the result has no measurements over steps and no events.

    Raises:
      InputError: there is no such folder, it lacks config.json or metrics.jsonl, a file does not parse, or the run has
        ended and a file is not the one that was written.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a run.")
    for file in ("config.json", "metrics.jsonl") if metrics else ("config.json",):
        require(
            (folder / file).is_file(),
            f"{str(folder)!r} is not a run folder: it has no {file}; give a folder that a training run wrote, or restore the file.",
        )
    config = read_json(folder / "config.json")
    kind = flatten(config).get("model.connection.kind")
    sections = [config.get(name) for name in ("model", "data", "optimizer", "train")]
    require(
        isinstance(kind, str) and all(isinstance(section, Mapping) for section in sections),
        f"{str(folder / 'config.json')!r} has no model.connection.kind or lacks a section; it is not the config of a run.",
    )
    env_file, summary_file = folder / "env.json", folder / "summary.json"
    env = read_json(env_file, "restore it, or remove it to go on without it") if env_file.exists() else {}
    summary = None
    if summary_file.exists():
        advice = "remove it, and run the command of the run again, which writes it anew"
        summary = read_json(summary_file, advice)
        require(read_summary(folder) is not None, f"{summary_file} has no status and steps of a run; {advice}.")
    require_whole(folder)
    return run_of(folder, folder.resolve().name, config, env, summary, folder / "metrics.jsonl" if metrics else None)


def run_of(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    env: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    metrics: Path | None,
) -> RunRecord:
    """Make the `RunRecord` of a run from its parts.

    Args:
      folder: value of `RunRecord.folder`.
      name: name of the run.
      config: content of config.json.
      env: content of env.json.
      summary: content of summary.json, or None.
      metrics: path of metrics.jsonl.  None means no measurements over steps and no events.

    Raises:
      InputError: `metrics` does not parse.
    """
    lines = {kind: [] for kind in (*MEASUREMENTS, "event")} if metrics is None else _read_lines(metrics)
    return RunRecord(
        name=name,
        folder=folder,
        config=config,
        env=env,
        summary=summary,
        train=_columns(lines["train"]),
        validation=_columns(lines["validation"]),
        diagnostics=lines["diagnostics"],
        events=lines["event"],
    )


def series(record: RunRecord, kind: str, key: str) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, "K ..."]]:
    """Return the steps and values of one measurement of a run, in the order of steps.

    Both are empty when no line has the key.

    Args:
      record: the run.
      kind: `train`, `validation` or `diagnostics`.
      key: name of the measurement, e.g. `loss` (values [K]) or `composite_forward` (values [K, L]).
    """
    one_of("kind", kind, MEASUREMENTS)
    if kind == "diagnostics":
        lines = [line for line in record.diagnostics if line.get(key) is not None]
        steps = np.asarray([line["step"] for line in lines], int)
        return steps, np.stack([line[key] for line in lines]) if lines else np.empty(0)
    columns = record.train if kind == "train" else record.validation
    if key not in columns:
        return np.empty(0, int), np.empty(0)
    return columns["step"].astype(int), columns[key]


def last_diagnostics(record: RunRecord, key: str) -> tuple[int, Float[np.ndarray, "L ..."]] | None:
    """Return (step, values of `key`) of the last diagnostics line with a finite number in `key`, or None if there is none."""
    for line in reversed(record.diagnostics):
        if line.get(key) is not None and np.isfinite(line[key]).any():
            return line["step"], line[key]
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn a nested mapping into a flat one with dotted keys: {"model": {"width": 8}} becomes {"model.width": 8}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def identity(config: Mapping[str, Any], neutral: bool = False) -> dict[str, Any]:
    """Return a dict of the settings by which a run's variant is told from others.

    The dict has `connection` (a text such as `mhc:init=paper`) and, by dotted key, all other settings except the seeds.

    Args:
      config: configuration of the run as a nested mapping, as `mapping.to_mapping` wrote it.
      neutral: whether the dict has the neutral settings, too: `NEUTRAL_KEYS` and those of `NEUTRAL_SECTIONS`.
    """
    sections = ("model.connection.", *([] if neutral else [f"{name}." for name in NEUTRAL_SECTIONS]))
    keys = SEED_KEYS if neutral else SEED_KEYS + NEUTRAL_KEYS
    kept = {k: v for k, v in flatten(config).items() if not k.startswith(sections) and k not in keys}
    return {"connection": spec_of_mapping(config["model"]["connection"]), **kept}


def identities(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return for each run the dict of settings that `identity` returns, by which its variant is told from others.

    If all runs recorded a hash of their training text, each dict also has the key `text`: the first eight digits of this hash.  If
    two runs differ in neutral settings alone (see `identity`), as in a sweep over meshes, the dicts include these settings.

    Runs with the same texts and tokenizer have the same names of them (`TEXT_KEYS`), those of the first of these runs.
    """
    hashes = [flatten(record.env).get("data.train_sha256") for record in records]
    texts = [{} if None in hashes else {"text": str(text)[:8]} for text in hashes]

    def all_of(neutral: bool) -> list[dict[str, Any]]:
        names: dict[str, dict[str, Any]] = {}  # by the content that they name
        out = []
        for record, text in zip(records, texts, strict=True):
            settings = identity(record.config, neutral) | text
            data = flatten(record.env)
            content = json.dumps([data.get(f"data.{key}") for key in CONTENT_KEYS])
            if text and "null" not in content:
                settings |= names.setdefault(content, {key: settings[key] for key in TEXT_KEYS if key in settings})
            out.append(settings)
        return out

    known = zip(all_of(neutral=False), records, strict=True)
    distinct = {(json.dumps(settings, sort_keys=True), record.seed) for settings, record in known}
    return all_of(neutral=len(distinct) < len(records))


def not_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration, by dotted key, that differ from the project's defaults.

    The connection and the seeds are left out.
    """
    defaults = flatten(to_mapping(ExperimentConfig()))
    return {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith("model.connection.") and key not in SEED_KEYS and value != defaults.get(key, ABSENT)
    }


def paired_gap(
    record: RunRecord, baseline: RunRecord, kind: str
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Return the steps that both runs logged, and at each step the loss of `record` minus that of `baseline` (nats/token).

    Args:
      record: the run to compare.  It has the lower loss if the difference is below 0.
      baseline: the run with which `record` is compared.
      kind: kind of the loss, `train` or `validation`.
    """
    steps, loss = series(record, kind, "loss")
    base_steps, base_loss = series(baseline, kind, "loss")
    common, i, j = np.intersect1d(steps, base_steps, return_indices=True)
    return common, loss[i] - base_loss[j]


def seed_name(seed: tuple[int, int]) -> str:
    """Return the seeds (train.seed, data.seed) as words: `seed 1` if they are equal, else `seeds 0/1`."""
    return f"seed {seed[0]}" if seed[0] == seed[1] else f"seeds {seed[0]}/{seed[1]}"


def labels(records: Sequence[RunRecord], seeds: bool = True) -> list[str]:
    """Name each run by its connection, by the other settings in which the runs differ, and by its seeds if the seeds differ.

    Paths lose the beginning that all paths of a setting share.  Each further run of the same name gets one more prime (').

    Args:
      records: the runs.
      seeds: whether the names hold the seeds.  If not, names get no primes either.
    """
    known = identities(records)
    keys = [key for key in dict.fromkeys(key for settings in known for key in settings) if key != "connection"]
    varying = [key for key in keys if len({json.dumps(settings.get(key, ABSENT)) for settings in known}) > 1]
    shared = {key: _shared([settings[key] for settings in known if key in settings]) for key in varying}
    several = seeds and len({record.seed for record in records}) > 1
    out: list[str] = []
    for record, settings in zip(records, known, strict=True):
        words = [
            f"{SHORT.get(k, k.rpartition('.')[2])}={_word(settings[k]).removeprefix(shared[k])}"
            for k in varying
            if k in settings
        ]
        label = " ".join([settings["connection"], *words, *([seed_name(record.seed)] if several else [])])
        while seeds and label in out:
            label += "'"
        out.append(label)
    return out


def _shared(values: Sequence[Any]) -> str:
    """Return the folders, and the file before a colon if all values are paths, that the paths of a setting have in common.

    It is empty if a value without it would be empty or equal another value.
    """
    paths = [value for value in values if isinstance(value, str) and "/" in value]
    common = os.path.commonprefix(paths)  # noqa: RUF071  (a colon ends a file, too)
    ends = "/:" if len(paths) == len(values) else "/"
    beginning = common[: max(map(common.rfind, ends)) + 1]
    words = {_word(value) for value in values}
    short = {word.removeprefix(beginning) for word in words}
    return beginning if len(short) == len(words) and "" not in short else ""


def _word(value: Any) -> str:
    return ("+".join(map(str, value)) or "none") if isinstance(value, list) else f"{value}"


def _read_lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of metrics.jsonl by their kind, each a mapping.  Lists in diagnostics lines become float64 arrays."""
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*MEASUREMENTS, "event")}
    seen: set[tuple[str, int]] = set()
    raw = [(number, text) for number, text in enumerate(path.read_bytes().split(b"\n"), 1) if text.strip()]
    for number, text in raw:
        try:
            line = json.loads(text.decode())
            kind, line["step"] = line["kind"], int(line["step"])
            if not isinstance(kind, str):
                raise TypeError(f"its kind is {kind!r}")
            if kind == "diagnostics":
                line |= {key: np.asarray(value, float) for key, value in line.items() if isinstance(value, list)}
            line |= {key: float(value) for key, value in line.items() if type(value) is int and abs(value) > 2**53}
            if kind != "event" and (kind, line["step"]) in seen:
                raise ValueError("this step came before")
            seen.add((kind, line["step"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            if number == raw[-1][0]:
                break
            raise InputError(
                f"Line {number} of {str(path)!r} is not a JSON object with a kind and a new step ({error}); remove that line."
            ) from error
        lines.setdefault(kind, []).append(line)
    return lines


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Float[np.ndarray, " K"]]:
    """Return the values of each numeric key of the lines as an array, where NaN stands for null and missing values."""
    keys = sorted({k for line in lines for k, v in line.items() if isinstance(v, int | float)} | {"step"})
    return {key: np.asarray([line.get(key) for line in lines], float) for key in keys}
