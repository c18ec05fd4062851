"""Enter configurations into the board, and write its page experiments/records/BOARD.md from the records of all entries.

    python experiments/board.py                                                     # writes BOARD.md
    python experiments/board.py enter mhc:init=home --name=mhc-init-home
    python experiments/board.py enter my_config.py --name=my-idea --author='A. Name'
    python experiments/board.py enter residual hc mhc:init=paper mhc:init=home      # several, named after their connections
    python experiments/board.py best mhc-init-home                                  # status 1 if it became the best of no track
    python experiments/board.py models                                              # models of runs/board as safetensors

What follows `enter` is a connection for the task's model (`experiments/configs/board.py`), or a config file with `get_config`, with
:arg if it takes an argument.  BOARD.md has the rules.  `enter` first times the step of every entry beside residual's; no other work
may run on the machine until it says "all steps are timed".  Then it trains all seeds of both tracks in WORKDIR/NAME, writes the
record experiments/records/<date>-board-NAME, and writes BOARD.md.  A call that was stopped goes on with the same command, and
entries that have a record are skipped.  Exit status of `enter`: 0 done, 1 a run failed, 2 an entry breaks a rule, 130 stopped.

`models` writes the models of residual, hc and mhc-init-home (seed 0, equal tokens) to experiments/models/NAME, five megabytes
together.  docs/weights.md says how notebooks and your own model load them.
"""

import re
from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.connections import parse
from mhc_jax.errors import InputError, require
from mhc_jax.reports import board
from mhc_jax.reports.board_entry import Candidate, Setup, enter
from mhc_jax.reports.board_models import write_models
from mhc_jax.reports.board_rules import BASELINE, LEAST_SEEDS, TRACKS
from mhc_jax.sweeps.grid import call_in_file, run_name
from mhc_jax.sweeps.runner import default_workers
from mhc_jax.timing.turns import step_beside_baseline

HERE = Path(__file__).resolve().parent
NAME = flags.DEFINE_string("name", "", "Name of the entry (default: made of what is given).")
AUTHOR = flags.DEFINE_string("author", "", "Who enters; the line of records shows it.")
SEEDS = flags.DEFINE_integer("seeds", LEAST_SEEDS, "Number of seeds.")
WORKDIR = flags.DEFINE_string("workdir", "runs/board", "Folder of the runs.")
WORKERS = flags.DEFINE_integer("workers", 0, "Runs side by side; 0: one per two cores.")
ROUNDS = flags.DEFINE_integer("rounds", 40, "Timed steps of the entry and of residual.", lower_bound=1)
MODELS = flags.DEFINE_string("models", "", "Folder of the models (default experiments/models).")
RECORDS = flags.DEFINE_string("records", "", "Folder of the records (default experiments/records).")


def config_of(given: str) -> ExperimentConfig:
    """Return the configuration of a connection for the task's model, or of a config file such as `my_config.py:arg`."""
    file = re.fullmatch(r"(.+?\.py)(?::(.*))?", given)
    if file is None:
        parse(given)
        config, _ = call_in_file(HERE / "configs" / "board.py", "get_config", given)
    else:
        config, _ = call_in_file(Path(file[1]), "get_config", *([file[2]] if file[2] else []))
    try:
        return from_mapping(config.to_dict())
    except AttributeError:
        raise InputError(
            f"get_config of {given} returned a {type(config).__name__}; it must return a ConfigDict."
        ) from None


def candidate_of(given: str) -> Candidate:
    """Return what is to be entered: the name is --name, or made of the connection or the name of the config file."""
    file = re.fullmatch(r"(?:.*/)?(.+?)\.py(:.*)?", given)
    name = NAME.value or run_name({"connection": given if file is None else file[1] + (file[2] or "")})
    require(
        re.fullmatch(r"[\w.+-]+", name) is not None,
        f"--name is {name!r}; give letters, digits, dots, plus signs, minus signs and underscores.",
    )
    return Candidate(name, given, config_of(given))


def main(words: list[str]) -> int:
    """Enter configurations, say whether entries became the best, write models, or write the page; return the exit status."""
    command, *rest = words or ["page"]
    records, task = Path(RECORDS.value or HERE / "records"), config_of(BASELINE)
    if command == "page" and not rest:
        print(board.write_page(records, task))
        return 0
    if command == "models" and not rest:
        folder = Path(MODELS.value or HERE / "models")
        print(*write_models(Path(WORKDIR.value), folder, task.train.steps), sep="\n")
        return 0
    require(
        command in ("enter", "best") and bool(rest),
        "The commands are `enter SPEC_OR_CONFIG.py ...`, `best NAME ...` and `models`; without a command BOARD.md is written.",
    )
    status, names = 0, rest
    if command == "enter":
        require(len(rest) == 1 or not NAME.value, "--name names one entry; leave it out to enter several.")
        workers = WORKERS.value or default_workers()
        candidates = [candidate_of(given) for given in rest]

        def measure(config: ExperimentConfig, baseline: ExperimentConfig) -> tuple[float, float]:
            return step_beside_baseline(config, baseline, ROUNDS.value)

        setup = Setup(task, Path(WORKDIR.value), records, SEEDS.value, workers, ROUNDS.value, measure, AUTHOR.value)
        status = enter(candidates, setup)
        names = [candidate.name for candidate in candidates]
        print(board.write_page(records, task))
    entries = board.read_entries(records, task)
    known = {entry.name for entry in entries}
    accepted = []
    for name in names if BASELINE in known else []:
        if command == "best" or name in known:
            found = {track: board.challenge_of(entries, name, track) for track in TRACKS}
            print("\n".join(challenge.sentence(track) for track, challenge in found.items()))
            accepted.append(any(challenge.accepted for challenge in found.values()))
    require(
        command == "enter" or BASELINE in known, f"{BASELINE} has not been entered, with which entries are compared."
    )
    return status if command == "enter" else int(not all(accepted))


if __name__ == "__main__":
    cli.main(main, None, computes=True)
