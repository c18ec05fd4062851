"""Reads back what trackers wrote: TensorBoard's event files by TensorBoard, and files of offline wandb runs by wandb's protocol."""

import json
import struct
import types
from pathlib import Path


def tensorboard(folder: Path) -> types.SimpleNamespace:
    """What TensorBoard shows of a run folder: scalars and histograms by name and step, and texts of events by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    shown.Reload()
    names = shown.Tags()
    texts = shown.Tensors("event/text_summary") if "event/text_summary" in names["tensors"] else []
    return types.SimpleNamespace(
        scalars={name: {event.step: event.value for event in shown.Scalars(name)} for name in names["scalars"]},
        histograms={
            name: {event.step: event.histogram_value for event in shown.Histograms(name)}
            for name in names["histograms"]
        },
        events={event.step: event.tensor_proto.string_val[0].decode() for event in texts},
    )


def wandb(folder: Path) -> types.SimpleNamespace:
    """The record of the run, and the logged values by step, of the only offline run of wandb in a run folder."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    runs, rows = [], {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows[record.history.step.num] = row
    return types.SimpleNamespace(run=runs[0], rows=rows)


def records(data: bytes):
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    A block has 32768 bytes.  A part of a record has a checksum (4 bytes), its length (2) and its kind: 1 whole, 2 first, 3 middle,
    4 last.
    """
    at, record = 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no part begins here
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
