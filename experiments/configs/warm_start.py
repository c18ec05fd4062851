"""Configure a run that starts from another run, or from a converted model, with the settings of that folder.

    python experiments/train.py --config=experiments/configs/warm_start.py:runs/demo/residual --workdir=runs/more
    python experiments/train.py --config=experiments/configs/warm_start.py:runs/demo/residual,mhc --workdir=runs/with-streams

The argument after the colon is the folder, and a connection behind a comma if it is another one.  Every setting can be changed by a
flag, such as --config.train.steps=400, --config.data.source=TEXT or --config.train.init_state=all (docs/warm_start.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse
from mhc_jax.errors import require, user_path
from mhc_jax.runs.warm_start import settings_of


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration.  `arg` is the folder, or the folder and a connection with a comma between."""
    folder, connection = arg, ""
    if not user_path(arg).is_dir():
        folder, _, connection = arg.rpartition(",") if "," in arg else (arg, "", "")
    require(
        bool(folder),
        "The config file warm_start.py needs a folder; give --config=experiments/configs/warm_start.py:FOLDER.",
    )
    config = ConfigDict(to_mapping(settings_of(Path(folder))))
    if connection:
        config.model.connection = to_mapping(parse(connection))
    return config
