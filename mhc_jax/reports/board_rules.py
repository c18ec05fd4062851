"""The rules of the board (`experiments/records/BOARD.md`): its tracks, and what is allowed in an entry.

An entry is a configuration.  It is trained over paired seeds on the same text as the residual model of the task, the configuration
`experiments/configs/board.py:residual`.  In the track `tokens` it reads at most as many tokens as residual.  In the track `clock`
it trains at most as long: it has S / r steps, rounded down, where S is the number of residual's steps, and r the time of the
entry's train step over that of residual's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mhc_jax.analysis.run_reader import NEUTRAL_KEYS, SEED_KEYS, flatten
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.cost.counts import parameter_counts
from mhc_jax.data.tokenizers import load_tokenizer
from mhc_jax.errors import require
from mhc_jax.train_step import init_state

TRACKS = {"tokens": "Equal tokens", "clock": "Equal wall clock on two cores"}
"""Names of the tracks, and their titles in BOARD.md."""
MOST_PARAMETERS = 600_000
"""Largest number of parameters of an entry, those of embeddings and connections included."""
LEAST_SEEDS = 5
"""Smallest number of seeds of an entry."""
CORES = 2
"""Number of CPU cores on which steps are timed."""
BASELINE = "residual"
"""Name of the entry that is the task's own configuration, with which all others are compared."""
TASK_FILE = "experiments/configs/board.py"
FIXED = ("train.validation_batches", "train.init_from")
"""Settings, besides those of the section `data`, that an entry takes from the task."""
FREE = (*SEED_KEYS, "train.steps")
"""Settings in which the runs of one entry differ."""
UNMEASURED = (*NEUTRAL_KEYS, "train.log_every", "train.validate_every", "train.diagnostics_every")
"""Settings that change no final loss.  By them an entry is not told from others."""


def with_vocabulary(config: ExperimentConfig) -> ExperimentConfig:
    """Return a configuration in which model.vocab_size is that of the tokenizer if it was 0."""
    if config.model.vocab_size:
        return config
    return config.with_settings(model={"vocab_size": load_tokenizer(config.data.tokenizer).vocab_size})


def check_entry(name: str, config: ExperimentConfig, task: ExperimentConfig, seeds: int) -> None:
    """Raise `InputError` if an entry breaks a rule that its configuration shows.  Nothing is trained for that.

    Args:
      name: name of the entry.
      config: configuration of the entry, whose seeds do not count.
      task: configuration of the residual model of the task.
      seeds: number of seeds of the entry.
    """
    check_settings(name, to_mapping(config), task)
    require(seeds >= LEAST_SEEDS, f"{name} has {seeds} seeds; an entry of the board has at least {LEAST_SEEDS}.")
    check_tokens(name, config.train.steps, task)
    whole = with_vocabulary(config)
    check_parameters(name, parameter_counts(jax.eval_shape(lambda: init_state(whole)).params)[0])


def check_settings(name: str, config: Mapping[str, Any], task: ExperimentConfig) -> None:
    """Raise `InputError` if a nested configuration lacks a setting that all entries share, or is named residual and is another."""
    given, ours = flatten(config), flatten(to_mapping(task))
    for key in (*(k for k in ours if k.startswith("data.") and k not in SEED_KEYS), *FIXED):
        found = given.get(key, ours[key])
        require(
            found == ours[key],
            f"{name} sets {key} to {found!r}, and the board's is {ours[key]!r}; take the text, the batches, the validation and the "
            f"start from random parameters as they are in {TASK_FILE}.",
        )
    skipped = (*SEED_KEYS, *UNMEASURED)
    different = [k for k in ours if k not in skipped and given.get(k, ours[k]) != ours[k]]
    require(
        name != BASELINE or not different,
        f"{BASELINE} is the name of the task's own configuration, {TASK_FILE}:residual, and this one differs in "
        f"{', '.join(different)}; give it another name.",
    )


def check_parameters(name: str, parameters: int) -> None:
    """Raise `InputError` if an entry has too many parameters."""
    require(
        parameters <= MOST_PARAMETERS,
        f"{name} has {parameters:,} parameters; an entry of the board has at most {MOST_PARAMETERS:,}.",
    )


def check_tokens(name: str, steps: int, task: ExperimentConfig) -> None:
    """Raise `InputError` if an entry reads more tokens than residual in the track of equal tokens."""
    tokens = task.data.batch_size * task.data.sequence_length
    require(
        steps <= task.train.steps,
        f"{name} reads {steps} steps x {tokens} = {steps * tokens:,} tokens; the track of equal tokens allows "
        f"{task.train.steps} steps, {task.train.steps * tokens:,} tokens.",
    )


def step_ratio(step_s: float, residual_step_s: float) -> float:
    """Return r, the time of an entry's train step over that of residual's, rounded to 0.001."""
    require(step_s > 0 and residual_step_s > 0, f"A step took {step_s} s and {residual_step_s} s; time them again.")
    return round(step_s / residual_step_s, 3)


def clock_steps(r: float, task: ExperimentConfig) -> int:
    r"""Return the number of steps in the track of equal wall clock: $\lfloor S / r \rfloor$, with S steps of residual."""
    thousandths = round(1000 * r)  # in whole numbers, so that 600 / 1.2 is 500
    require(
        0 < thousandths <= 1000 * task.train.steps, f"r is {r}, with which no step of the track of equal time is left."
    )
    return 1000 * task.train.steps // thousandths


def check_record(
    name: str, board: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], task: ExperimentConfig
) -> None:
    """Raise `InputError` if the record of an entry breaks a rule.

    Args:
      name: name of the entry.
      board: content of board.json.
      runs: for each run its `config` (nested), `env` and `summary`.
      task: configuration of the residual model of the task.
    """
    timing, steps = board["timing"], board["steps"]
    expected = 1.0 if name == BASELINE else step_ratio(timing["step_s"], timing["residual_step_s"])
    require(
        timing["r"] == expected,
        f"The record of {name} says r = {timing['r']}, and its step times give {expected}; enter it again.",
    )
    require(
        timing["cores"] == CORES,
        f"The steps of {name} were timed on {timing['cores']} cores, and the board's are timed on {CORES}; enter it again.",
    )
    check_tokens(name, steps["tokens"], task)
    most = clock_steps(timing["r"], task)
    require(
        steps["clock"] <= most,
        f"{name} has {steps['clock']} steps in the track of equal wall clock; with r = {timing['r']} it has at most {most}.",
    )
    first = flatten(runs[0]["config"])
    for run in runs:
        differing = [k for k, v in flatten(run["config"]).items() if k not in FREE and first.get(k, v) != v]
        require(not differing, f"The runs of {name} differ in {', '.join(differing)}; an entry is one configuration.")
        check_settings(name, run["config"], task)
        check_parameters(name, run["summary"]["parameters"])
    for track in TRACKS:
        of_track = [run["config"] for run in runs if run["config"]["train"]["steps"] == steps[track]]
        seeds = sorted((config["train"]["seed"], config["data"]["seed"]) for config in of_track)
        require(
            seeds == [(k, k) for k in range(len(seeds))],
            f"The seeds of {name} in the track {track} are {seeds}; they must be train.seed = data.seed = 0, 1, 2 and so on.",
        )
        require(
            len(seeds) >= LEAST_SEEDS,
            f"{name} has {len(seeds)} seeds in the track {track}; an entry of the board has at least {LEAST_SEEDS}.",
        )


def same_text(hashes: Mapping[str, str]) -> None:
    """Raise `InputError` if entries were trained on different texts.  `hashes` has the text's SHA-256 by name of the entry."""
    for name, found in hashes.items():
        first = next(iter(hashes))
        require(
            found == hashes[first],
            f"{name} was trained on another text (sha256 {found[:8]}) than {first} ({hashes[first][:8]}); enter it again with "
            "the text of this package.",
        )
