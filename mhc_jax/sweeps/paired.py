"""A paired set of runs: one configuration, several connections, several seeds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from mhc_jax import connections
from mhc_jax.analysis.comparison import rows
from mhc_jax.analysis.records import read_run
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.data import load_data
from mhc_jax.errors import require
from mhc_jax.loop import EXIT_CODES, train
from mhc_jax.reports.page import markdown_table, write_report
from mhc_jax.runs.folder import check_run_folder


def plan(base: ExperimentConfig, specs: Sequence[str], seeds: int = 1) -> dict[str, ExperimentConfig]:
    """Run name -> configuration, `base` with each connection and seed in its place.

    Args:
      base: shared by all runs.
      specs: connections as `connections.parse` takes them.
      seeds: runs of each; train.seed and data.seed count up from those of `base`.

    Raises:
      InputError: no spec, an unknown kind or setting, or two specs of the same connection or name.
    """
    require(len(specs) > 0, "No connection is given; name at least one, such as 'mhc'.")
    runs, seen = {}, {}
    for spec in specs:
        connection = connections.parse(spec)
        twin = seen.get(connection)
        require(twin is None, f"Connections {twin!r} and {spec!r} are the same; each run needs settings of its own.")
        seen[connection] = spec
        for k in range(seeds):
            name = re.sub(r"[^\w.-]+", "-", spec) + (f"-seed{base.train.seed + k}" if seeds > 1 else "")
            require(
                name not in runs, f"Connection {spec!r} and another one would share the run folder {name!r}; give one."
            )
            runs[name] = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, connection=connection),
                train=dataclasses.replace(base.train, seed=base.train.seed + k),
                data=dataclasses.replace(base.data, seed=base.data.seed + k),
            )
    return runs


def run_all(runs: dict[str, ExperimentConfig], folder: Path, title: str) -> int:
    """Train what is not done, one run after the other, then write `folder/report.html` and print the table.

    Returns:
      Exit status: 0, or 130 when a run was interrupted (a further call goes on).  A run that diverges is a result, not
      an error.

    Raises:
      InputError: a run folder that cannot be used, before the first run starts.
    """
    for name, config in runs.items():
        check_run_folder(folder / name, to_mapping(config))
    loaded = {}
    for name, config in runs.items():
        source = dataclasses.replace(config.data, seed=0)
        if source not in loaded:
            loaded[source] = load_data(config.data)
        data = dataclasses.replace(loaded[source], config=config.data)
        summary = train(config, folder / name, label=name, data=data)
        if summary["status"] == "interrupted":
            return EXIT_CODES["interrupted"]
    records = [read_run(folder / name) for name in runs]
    report = write_report(records, folder, title)
    print(f"\n{markdown_table(rows(records))}\n\nReport: {report}")
    return 0
