"""Runs grouped by setting, and what each setting is compared with.

Runs of one setting differ in their seeds alone.  The baseline of a setting is the setting that has the baseline's connection and
agrees in every other setting that a run's numbers depend on; where there is none, nothing is compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_jax import connections
from mhc_jax.analysis.records import SEED_KEYS, RunRecord, flatten, identities, labels
from mhc_jax.errors import require

Baseline = Mapping[str, Any]
"""Settings that a baseline has, by dotted key or `connection` (a spec); it shares all others with what is compared."""
ENDED = ("finished", "diverged")


@dataclass(frozen=True)
class Setting:
    """A setting and its runs."""

    label: str
    """The connection's spec, and the other settings that differ between the settings of the group."""
    kind: str
    varying: Mapping[str, Any]
    """Settings that differ between those of its kind, by dotted key."""
    runs: Mapping[tuple[int, int], RunRecord]
    """(train.seed, data.seed) to run."""
    baseline: Setting | None = None
    """What it is compared with; None for a baseline itself, and where no setting matches."""
    is_baseline: bool = False

    @property
    def any_run(self) -> RunRecord:
        """The run of the first seed."""
        return self.runs[min(self.runs)]

    @property
    def diverged(self) -> int:
        """Runs that diverged."""
        return sum(run.status == "diverged" for run in self.runs.values())

    @property
    def unfinished(self) -> int:
        """Runs that have not ended."""
        return sum(run.status not in ENDED for run in self.runs.values())

    @property
    def finished(self) -> list[RunRecord]:
        """Runs that finished."""
        return [run for run in self.runs.values() if run.status == "finished"]

    def results(self, key: str) -> dict[tuple[int, int], float]:
        """Seed to a number of summary.json, for the seeds that have one and ended well."""
        found = {seed: run.result(key) for seed, run in self.runs.items() if run.status == "finished"}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def mean(self, key: str) -> float | None:
        """Mean over `results`."""
        values = list(self.results(key).values())
        return float(np.mean(values)) if values else None

    def label_without(self, key: str) -> str:
        """The connection's spec and the settings that vary, all but `key`."""
        section, _, leaf = key.rpartition(".")
        connection = dict(self.any_run.config["model"]["connection"])
        if section == "model.connection":
            connection.pop(leaf, None)
        others = {k: v for k, v in self.varying.items() if k != key and not k.startswith("model.connection.")}
        words = [f"{k.rpartition('.')[2]}={v}" for k, v in others.items()]
        return " ".join([connections.spec_of_mapping(connection), *words])


def group(records: Sequence[RunRecord], baseline: Baseline | None = None) -> list[Setting]:
    """Settings in the order of their first runs, each with its baseline.

    Args:
      records: the runs.
      baseline: what the others are compared with; None: the residual connection or, without residual runs, the first run's
        connection.

    Raises:
      InputError: no runs, or two of one configuration.
    """
    require(bool(records), "There are no runs to report; give a folder that holds run folders.")
    members: dict[str, dict[tuple[int, int], RunRecord]] = {}
    what = dict(zip(map(id, records), identities(records), strict=True))
    for record in records:
        runs = members.setdefault(_text(what[id(record)]), {})
        if (twin := runs.get(record.seed)) is not None:
            require(False, f"{record.folder} is the same run as {twin.folder}; report one of them.")
        runs[record.seed] = record
    firsts = [next(iter(runs.values())) for runs in members.values()]
    if baseline is None:
        residual = [record for record in firsts if record.kind == "residual"]
        baseline = {"connection": (residual or firsts)[0].connection}
    elif "connection" in baseline:
        baseline = {**baseline, "connection": connections.spec(connections.parse(baseline["connection"]))}
    targets = [_text({**what[id(record)], **baseline}) for record in firsts]
    names = labels(firsts, seeds=False)
    plain = {
        text: Setting(name, record.kind, _varying(record, firsts), members[text], is_baseline=text == target)
        for text, record, name, target in zip(members, firsts, names, targets, strict=True)
    }
    return [
        setting if setting.is_baseline else dataclasses.replace(setting, baseline=plain.get(target))
        for setting, target in zip(plain.values(), targets, strict=True)
    ]


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _varying(record: RunRecord, records: Sequence[RunRecord]) -> dict[str, Any]:
    flat = [flatten(other.config) for other in records if other.kind == record.kind]
    mine = flatten(record.config)
    return {
        key: mine[key]
        for key in mine
        if key not in SEED_KEYS and len({json.dumps(other.get(key)) for other in flat}) > 1
    }


def baselines(records: Sequence[RunRecord]) -> list[RunRecord | None]:
    """For each run the baseline's run of its seeds, with the usual baseline of `group`; None where there is none."""
    of_run = {}
    for setting in group(records):
        for seed, run in setting.runs.items():
            of_run[run.folder] = setting.baseline.runs.get(seed) if setting.baseline else None
    return [of_run[record.folder] for record in records]


def lines(settings: Sequence[Setting], key: str) -> dict[str, list[Setting]]:
    """Settings that differ in the number `key` alone, by what they share; at least two each."""
    out: dict[str, list[Setting]] = {}
    for setting in settings:
        value = setting.varying.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            out.setdefault(setting.label_without(key), []).append(setting)
    return {name: members for name, members in out.items() if len(members) > 1}


def loss_threshold(settings: Sequence[Setting]) -> float:
    """0.5 nats above the best mean validation loss of the sweep; infinity where no run has one."""
    means = [mean for setting in settings if (mean := setting.mean("validation_loss")) is not None]
    return min(means) + 0.5 if means else float("inf")


def frontier_lines(settings: Sequence[Setting]) -> dict[str, dict[float, list[float | None]]]:
    """What settings share to learning rate to the final losses of its runs, None for one that diverged.

    Rates stop below the first one with a run that has not ended: nothing can be said of it, nor of a frontier beyond it.
    """
    key = "optimizer.learning_rate"
    out: dict[str, dict[float, list[float | None]]] = {}
    for name, members in lines(settings, key).items():
        for setting in sorted(members, key=lambda s: s.varying[key]):
            if setting.unfinished:
                break
            losses = setting.results("validation_loss")
            out.setdefault(name, {})[setting.varying[key]] = [losses.get(seed) for seed in setting.runs]
    return out


def mean_record(setting: Setting) -> RunRecord:
    """The mean of a setting's runs as one record without seeds, for figures of single runs.

    Training and validation columns and diagnostics are averaged at the steps that all runs logged, numbers of the summary over
    the runs that have one; events and spikes are all runs' together.  Where a run finished, only those that did are taken.
    """
    runs = setting.finished or list(setting.runs.values())
    if len(setting.runs) == 1:
        return runs[0]
    first = runs[0]
    summaries = [run.summary for run in runs if run.summary is not None]
    summary: dict[str, Any] | None = dict(summaries[0]) if summaries else None
    for key in summary or {}:
        values = [s[key] for s in summaries if isinstance(s.get(key), int | float)]
        if summary and values:
            summary[key] = float(np.mean(values))
    if summary:
        summary |= {"spike_steps": [step for run in runs for step in run.spike_steps], "first_nonfinite_step": None}
    config = {
        name: {k: v for k, v in section.items() if k != "seed"} if isinstance(section, Mapping) else section
        for name, section in first.config.items()
    }
    return dataclasses.replace(
        first,
        name=setting.label,
        config=config,
        summary=summary,
        train=_mean_columns([run.train for run in runs]),
        validation=_mean_columns([run.validation for run in runs]),
        diagnostics=_mean_lines([run.diagnostics for run in runs]),
        events=[event for run in runs for event in run.events],
    )


def _mean_columns(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    steps = tables[0]["step"]
    for table in tables[1:]:
        steps = np.intersect1d(steps, table["step"])
    keys = set.intersection(*(set(table) for table in tables))
    rows = [np.isin(table["step"], steps) for table in tables]
    return {key: np.mean([t[key][row] for t, row in zip(tables, rows, strict=True)], axis=0) for key in sorted(keys)}


def _mean_lines(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    by_step = [{line["step"]: line for line in run} for run in runs]
    out = []
    for step in sorted(set.intersection(*(set(lines) for lines in by_step))):
        lines = [lines[step] for lines in by_step]
        keys = [k for k, v in lines[0].items() if isinstance(v, np.ndarray) and all(k in line for line in lines)]
        out.append({"step": step, **{key: np.mean([line[key] for line in lines], axis=0) for key in keys}})
    return out
