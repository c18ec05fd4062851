"""Writes records of board entries with made-up losses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.tiny_runs import ROOT

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.connections import parse
from mhc_jax.reports.record import write_runs
from mhc_jax.sweeps.grid import call_in_file

TASK: ExperimentConfig = from_mapping(
    call_in_file(ROOT / "experiments/configs/board.py", "get_config", "residual")[0].to_dict()
)
ENV = {"data": {"train_sha256": "a" * 64, "validation_sha256": "b" * 64}, "device": "cpu"}


def write_entry(
    records: Path,
    name: str,
    losses: Sequence[float | None],
    *,
    spec: str = "residual",
    date: str = "2026-01-02",
    step_s: float = 1.0,
    clock: Sequence[float | None] | None = None,
    steps: int = 600,
    parameters: int = 358_320,
    board: dict[str, Any] | None = None,
    sections: dict[str, dict[str, Any]] | None = None,
    sha256: str = "a" * 64,
    author: str = "",
) -> Path:
    """Write the record of an entry whose step takes `step_s` and residual's one second.

    `losses` are those of seeds 0, 1, ... with equal tokens, and None is the loss of a run that diverged.  `clock` are those with
    equal wall clock, `losses` without it.  `board` replaces keys of board.json, and `sections` settings of the configuration.
    """
    r = round(step_s, 3)
    tracks = {"tokens": steps, "clock": int(600 / r + 1e-9)}
    folder, runs = records / f"{date}-board-{name}", records.parent / f"runs-{name}"
    places = []
    for track, of_track in (("tokens", losses), ("clock", losses if clock is None else clock)):
        for seed, loss in enumerate(of_track):
            config = TASK.with_settings(model={"connection": parse(spec)}, **(sections or {}))
            config = config.with_settings(train={"steps": tracks[track], "seed": seed}, data={"seed": seed})
            place = runs / f"steps{tracks[track]}-seed{seed}"
            place.mkdir(parents=True, exist_ok=True)
            status = "diverged" if loss is None else "finished"
            summary = {"status": status, "steps": tracks[track], "validation_loss": loss, "parameters": parameters}
            data = {"data": ENV["data"] | {"train_sha256": sha256}}
            for file, value in (("config", to_mapping(config)), ("env", ENV | data), ("summary", summary)):
                (place / f"{file}.json").write_text(json.dumps(value))
            places += [place] if place not in places else []
    folder.mkdir(parents=True)
    write_runs(places, folder)
    timing = {"r": r, "step_s": step_s, "residual_step_s": 1.0, "rounds": 20, "cores": 2, "device": "cpu"}
    content = {"name": name, "given": spec, "author": author, "timing": timing, "steps": tracks}
    for key, value in (board or {}).items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (folder / "board.json").write_text(json.dumps(content))
    return folder
