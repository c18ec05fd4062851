"""Group runs into variants, and find the baseline with which each variant is compared.

The runs of a variant differ in their seeds alone.  The baseline of a variant has the settings that the sweep chose for baselines
(as a rule the residual connection), and agrees with the variant in every other setting that a run's numbers depend on.  If no
variant has all these settings, there is no baseline and no comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhc_jax import connections
from mhc_jax.analysis.run_reader import SEED_KEYS, RunRecord, flatten, identities, labels
from mhc_jax.errors import InputError, require

Baseline = Mapping[str, Any]
"""Settings by dotted key that make a variant a baseline.  The key `connection` takes a text such as `mhc:t_max=5`.

In all other settings a baseline agrees with the variant that is compared with it.
"""
ENDED = ("finished", "diverged")


@dataclass(frozen=True)
class Variant:
    """The runs whose configurations differ in seeds alone."""

    label: str
    """Text of the connection, such as `mhc:init=paper`, followed by the other settings in which the compared variants differ."""
    kind: str
    varying: Mapping[str, Any]
    """This variant's values, by dotted key, of the settings in which the variants of its kind of connection differ."""
    runs: Mapping[tuple[int, int], RunRecord]
    """Runs of the variant by their seeds (train.seed, data.seed)."""
    baseline: Variant | None = None
    """Variant with which this variant is compared.  None if this variant is a baseline, or if it has none."""
    is_baseline: bool = False

    @property
    def any_run(self) -> RunRecord:
        """The run of the variant with the lowest seeds (train.seed, data.seed)."""
        return self.runs[min(self.runs)]

    @property
    def shown_run(self) -> RunRecord:
        """The finished run of the variant with the lowest seeds.  If none finished, the run with the lowest seeds."""
        return min(self.finished or self.runs.values(), key=lambda run: run.seed)

    @property
    def diverged(self) -> int:
        """Number of runs of the variant that diverged."""
        return sum(run.status == "diverged" for run in self.runs.values())

    @property
    def unfinished(self) -> int:
        """Number of runs of the variant that have neither finished nor diverged."""
        return sum(run.status not in ENDED for run in self.runs.values())

    @property
    def finished(self) -> list[RunRecord]:
        """Runs of the variant that finished."""
        return [run for run in self.runs.values() if run.status == "finished"]

    def results(self, key: str) -> dict[tuple[int, int], float]:
        """Return the number `key` of summary.json by the seeds of the run, for the finished runs whose summary has it."""
        values = {run.seed: run.result(key) for run in self.finished}
        return {seed: float(value) for seed, value in values.items() if value is not None}

    def mean(self, key: str) -> float | None:
        """Return the mean of the number `key` of summary.json over the finished runs, or None if no finished run has it."""
        values = list(self.results(key).values())
        return float(np.mean(values)) if values else None

    def label_without(self, key: str) -> str:
        """Return the variant's label without the setting `key`: the text of the connection and the other settings that vary."""
        section, _, leaf = key.rpartition(".")
        connection = dict(self.any_run.config["model"]["connection"])
        if section == "model.connection":
            connection.pop(leaf, None)
        rest = {k: v for k, v in self.varying.items() if k != key and not k.startswith("model.connection.")}
        words = [f"{k.rpartition('.')[2]}={v}" for k, v in rest.items()]
        return " ".join([connections.spec_of_mapping(connection), *words])


def group(records: Sequence[RunRecord], baseline: Baseline | None = None) -> list[Variant]:
    """Group runs into variants, each with its baseline, in the order of their first runs.

    Args:
      records: the runs.
      baseline: settings of the variants that serve as baselines.  None means the residual connection or, if no run has it, the
        first run's connection.

    Raises:
      InputError: there are no runs, or two runs have the same configuration.
    """
    require(bool(records), "There are no runs to report; give a folder that holds run folders.")
    members: dict[str, dict[tuple[int, int], RunRecord]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for record, identity in zip(records, identities(records), strict=True):
        text = _text(identity)
        settings[text] = identity
        runs = members.setdefault(text, {})
        if twin := runs.get(record.seed):
            raise InputError(f"{record.folder} is the same run as {twin.folder}; report one of them.")
        runs[record.seed] = record
    firsts = [next(iter(runs.values())) for runs in members.values()]
    if baseline is None:
        residual = [record for record in firsts if record.kind == "residual"]
        baseline = {"connection": (residual or firsts)[0].connection}
    elif "connection" in baseline:
        baseline = {**baseline, "connection": connections.spec(connections.parse(baseline["connection"]))}
    targets = {text: _text({**identity, **baseline}) for text, identity in settings.items()}
    names = labels(firsts, seeds=False)
    variants = {
        text: Variant(name, first.kind, _varying(first, firsts), runs, is_baseline=text == targets[text])
        for (text, runs), first, name in zip(members.items(), firsts, names, strict=True)
    }
    return [
        variant if variant.is_baseline else dataclasses.replace(variant, baseline=variants.get(targets[text]))
        for text, variant in variants.items()
    ]


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _varying(record: RunRecord, records: Sequence[RunRecord]) -> dict[str, Any]:
    same_kind = [flatten(run.config) for run in records if run.kind == record.kind]
    return {
        key: value
        for key, value in flatten(record.config).items()
        if key not in SEED_KEYS and len({json.dumps(config.get(key)) for config in same_kind}) > 1
    }


def baselines(records: Sequence[RunRecord]) -> list[RunRecord | None]:
    """Return, for each run in `records`, the run of its variant's baseline with the same seeds, or None if there is none."""
    of_run = {}
    for variant in group(records):
        for seed, run in variant.runs.items():
            of_run[run.folder] = variant.baseline.runs.get(seed) if variant.baseline else None
    return [of_run[record.folder] for record in records]


def lines(variants: Sequence[Variant], key: str) -> dict[str, list[Variant]]:
    """Return groups of variants that differ in the setting `key` alone, by the label of the group (`Variant.label_without`).

    Variants whose value of `key` is no number are left out, and so are groups of fewer than two variants.
    """
    out: dict[str, list[Variant]] = {}
    for variant in variants:
        value = variant.varying.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            out.setdefault(variant.label_without(key), []).append(variant)
    return {name: members for name, members in out.items() if len(members) > 1}


def loss_threshold(variants: Sequence[Variant]) -> float:
    """Return the loss in nats/token from which a run counts as unstable: the lowest mean validation loss of a variant plus 0.5.

    The result is infinite if no run has finished.
    """
    means = [mean for variant in variants if (mean := variant.mean("validation_loss")) is not None]
    return min(means) + 0.5 if means else float("inf")


def frontier_lines(variants: Sequence[Variant]) -> dict[str, dict[float, list[float | None]]]:
    """Return final validation losses by learning rate, for each group of variants that differ in the learning rate alone.

    Groups and labels are those that `lines` returns.  None stands for the loss of a run that diverged.  The lowest learning rate
    with a run that has not ended, and all higher rates, are left out, because that run may still show that its rate is unstable.
    """
    key = "optimizer.learning_rate"
    out: dict[str, dict[float, list[float | None]]] = {}
    for name, members in lines(variants, key).items():
        for variant in sorted(members, key=lambda member: member.varying[key]):
            if variant.unfinished:
                break
            losses = variant.results("validation_loss")
            out.setdefault(name, {})[variant.varying[key]] = [losses.get(seed) for seed in variant.runs]
    return out


def mean_record(variant: Variant) -> RunRecord:
    """Average the runs of a variant into one `RunRecord` without seeds, which the figures of single runs can draw.

    If any run of the variant finished, only finished runs are averaged.  Training and validation columns and diagnostics are means
    at the steps that all averaged runs logged.  Numbers of the summary are means over the averaged runs that have them.  Events
    and spikes are those of all averaged runs.
    """
    runs = variant.finished or list(variant.runs.values())
    if len(variant.runs) == 1:
        return runs[0]
    summary: dict[str, Any] | None = None
    if summaries := [run.summary for run in runs if run.summary is not None]:
        numbers = {key: [s[key] for s in summaries if isinstance(s.get(key), int | float)] for key in summaries[0]}
        means = {key: float(np.mean(values)) for key, values in numbers.items() if values}
        spikes = [step for run in runs for step in run.spike_steps]
        summary = {**summaries[0], **means, "spike_steps": spikes, "first_nonfinite_step": None}
    sections = runs[0].config.items()
    config = {name: {key: value for key, value in section.items() if key != "seed"} for name, section in sections}
    return dataclasses.replace(
        runs[0],
        name=variant.label,
        config=config,
        summary=summary,
        train=_mean_columns([run.train for run in runs]),
        validation=_mean_columns([run.validation for run in runs]),
        diagnostics=_mean_lines([run.diagnostics for run in runs]),
        events=[event for run in runs for event in run.events],
    )


def _mean_columns(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    steps = functools.reduce(np.intersect1d, [table["step"] for table in tables])
    keys = set.intersection(*(set(table) for table in tables))
    return {key: np.mean([t[key][np.isin(t["step"], steps)] for t in tables], axis=0) for key in sorted(keys)}


def _mean_lines(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    by_step = [{line["step"]: line for line in run} for run in runs]
    out = []
    for step in sorted(set.intersection(*map(set, by_step))):
        lines = [of_run[step] for of_run in by_step]
        keys = [k for k, v in lines[0].items() if isinstance(v, np.ndarray) and all(k in line for line in lines)]
        out.append({"step": step, **{key: np.mean([line[key] for line in lines], axis=0) for key in keys}})
    return out
