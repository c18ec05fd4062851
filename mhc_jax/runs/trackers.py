"""TensorBoard and wandb (Weights & Biases), which show the metrics of a run in a browser.  `docs/trackers.md` lists what they get.

Everything that a tracker gets follows from the lines of metrics.jsonl.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.config.compound import Wandb, read_tracker
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import replacing

REDUCED = {
    "max": (
        *("composite_forward", "composite_backward", "row_error", "column_error"),
        *("res_logit_max", "grad_norm_per_layer"),
    ),
    "min": ("res_logit_min", "grad_norm_per_layer"),
    "mean": (*STREAM_MEASURES, "saturation"),
}
"""Keys of a diagnostics line of which trackers get a number over sub-layers (or blocks): the largest, the smallest or the mean."""
HISTOGRAMS = ("composite_forward", "composite_backward", "h_res", "grad_norm_per_layer")
"""Keys of a diagnostics line of which trackers get a histogram of all values."""
BINS = 64
"""Number of bins of a histogram, all of the same width."""
FINISH_S = 300
"""Longest time in seconds that the end of a run waits for wandb's server.  What is not sent by then stays in the run folder."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise `InputError` if the package of a tracker (`tensorboard` or `wandb`) is not installed."""
    for text in trackers:
        name = text.partition(":")[0]
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[name]
        require(
            importlib.util.find_spec(package) is not None,
            f"train.trackers has {name!r}, but {package} is missing: pip install {package}, or leave it out.",
        )


def scalars(kind: str, record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that trackers get of one line of metrics.jsonl, by name.

    A name is `kind/key`, or `diagnostics/max_key` (`min_`, `mean_`) for a list of a diagnostics line (`REDUCED`).  Null, which
    stands for a value that is not finite, and lists with null are left out.  Event lines have no scalars.

    >>> scalars("diagnostics", {"saturation": [0.0, 0.5], "row_error": [1.0, None]})
    {'diagnostics/mean_saturation': 0.25}

    Args:
      kind: kind of the line.
      record: values of the line, as `metrics.plain` returns them.
    """
    if kind == "event":
        return {}
    out = {key: value for key, value in record.items() if isinstance(value, float | int)}
    if kind == "diagnostics":
        functions = {"max": np.max, "min": np.min, "mean": np.mean}
        for name, keys in REDUCED.items():
            present = {key: record[key] for key in keys if key in record and None not in record[key]}
            out |= {f"{name}_{key}": float(functions[name](values)) for key, values in present.items()}
    return {f"{kind}/{key}": value for key, value in out.items()}


def histograms(kind: str, record: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the values [K] of each histogram that trackers get of one line of metrics.jsonl, and the edges [BINS + 1] of its bins.

    Names and arguments are as in `scalars`.  Values that are not finite are left out.
    """
    out = {}
    for key in HISTOGRAMS if kind == "diagnostics" else ():
        values = np.asarray(record.get(key, []), float).ravel()
        values = values[np.isfinite(values)]
        if values.size:
            # The margin gives bins a width where all values are equal.
            low, high = values.min(), values.max()
            margin = 1e-6 * max(1.0, abs(low), abs(high))
            out[f"{kind}/{key}"] = values, np.linspace(low - margin, high + margin, BINS + 1)
    return out


def event_text(record: dict[str, Any]) -> str:
    """Return the values of an event line as one line of text.

    >>> event_text({"event": "spike", "loss": 9.5, "median": 3.25})
    'spike: loss 9.5, median 3.25'
    """
    details = ", ".join(f"{key} {value}" for key, value in record.items() if key != "event")
    return f"{record['event']}: {details}" if details else record["event"]


class TensorBoardTracker:
    """Writes event files into the folder `tensorboard` of a run folder.

    Points of steps after `keep_until` that an earlier process wrote are hidden.
    """

    def __init__(self, folder: Path, keep_until: int):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Add the scalars, histograms or the text of one line."""
        for name, value in scalars(kind, record).items():
            self._board.add_scalar(name, value, step)
        for name, (values, edges) in histograms(kind, record).items():
            self._board.add_histogram(name, values, step, bins=edges)  # pyright: ignore[reportArgumentType]
        if kind == "event":
            self._board.add_text("event", event_text(record), step)

    def close(self) -> None:
        """Write what is pending, and close the event file."""
        self._board.close()


class WandbTracker:
    """Logs to a run of wandb, which goes on with the same id if the run folder is used again (file `wandb_id`).

    If wandb's server does not answer or does not know the user, the run is logged offline, into the folder `wandb` of the run
    folder.

    Raises:
      InputError: wandb refuses the settings, or the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Wandb, config: Any):
        import wandb

        # Folders of two comparisons may have the same name.  So the wandb run has a random id, which a file in the folder keeps.
        id_file = folder / "wandb_id"
        try:
            known = id_file.exists() and re.fullmatch(r"[0-9a-f]{32}", id_file.read_text(errors="replace"))
        except OSError as error:
            raise InputError(f"Cannot read {id_file}: {error.strerror}; mend that and run the same command.") from error
        if not known:
            with replacing(id_file) as file:
                file.write_text(uuid.uuid4().hex)
        # Runs of a sweep, whose folder holds sweep.json, are one group.
        sweep = folder.resolve().parent
        given: Any = {
            "dir": str(folder),
            "id": id_file.read_text(),
            "resume": "allow",
            "config": config,
            "project": settings.project or None,
            "group": settings.group or (sweep.name if (sweep / "sweep.json").is_file() else None),
            "name": settings.name or folder.resolve().name,
            "tags": settings.tags or None,
            "settings": {"finish_timeout": FINISH_S},
        }
        self._wandb = wandb
        try:
            self._run = wandb.init(**given | ({"mode": settings.mode} if settings.mode else {}))
        except Exception as error:  # a refused key, no network, a time limit: wandb has a class for each
            warn(f"wandb does not answer ({one_line(error)}); this run is logged offline, `wandb sync` sends it later.")
            try:
                wandb.teardown()  # or else the service of wandb says that the id is in use
                self._run = wandb.init(**given | {"mode": "offline"})
            except Exception as error:
                raise InputError(f"wandb refuses the settings in train.trackers: {one_line(error)}.") from error

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Log the scalars, histograms or the text of one line."""
        row: dict[str, Any] = {**scalars(kind, record)}
        for name, (values, edges) in histograms(kind, record).items():
            row[name] = self._wandb.Histogram(np_histogram=np.histogram(values, edges))
        if kind == "event":
            row["event"] = event_text(record)
        self._run.log(row, step=step)

    def close(self) -> None:
        """Send what is pending, for at most `FINISH_S`, and end the run of wandb."""
        self._run.finish()


Tracker = TensorBoardTracker | WandbTracker


def make_trackers(trackers: Sequence[str], folder: Path, keep_until: int, config: Any) -> dict[str, Tracker]:
    """Return the trackers of a run by name.

    Args:
      trackers: entries of train.trackers.
      folder: folder of the run.
      keep_until: the last step whose numbers remain valid; -1 for a run that starts anew.
      config: configuration of the run as a nested mapping, which wandb shows.
    """
    out: dict[str, Tracker] = {}
    for text in trackers:
        settings = read_tracker(text)
        if settings is None:
            out["tensorboard"] = TensorBoardTracker(folder, keep_until)
        else:
            out["wandb"] = WandbTracker(folder, settings, config)
    return out


def warn(sentence: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """Return the message of an error as one line without a full stop at its end."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
