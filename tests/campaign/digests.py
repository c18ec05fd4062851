"""What must be equal at the end of a command that was disturbed and of one that was left alone.

A digest is a mapping from names to short texts.  It leaves out what differs from run to run anyway: times, dates, process ids, and
the names that Orbax draws for its files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = ("step_time_s", "tokens_per_s")
"""Values of metrics.jsonl that are times."""
LIFE = re.compile(r"/[^\"]*/(lives|alone|half)/[^/\"]+")
"""Folder of a life, within a text."""
EXPECTED_EVENTS = ("resumed", "interrupted")
"""Events of metrics.jsonl that say that a run was stopped."""


def sha(content: bytes | str) -> str:
    """Return the first digits of the SHA-256 of a content."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def run(folder: Path) -> dict[str, str]:
    """Return the digest of a run folder: measurements, events, the arrays of the newest checkpoint, and the summary."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [
        json.dumps({k: v for k, v in line.items() if k not in TIMES}) for line in lines if line["kind"] != "event"
    ]
    events = [json.dumps(line) for line in lines if line["kind"] == "event" and line["event"] not in EXPECTED_EVENTS]
    summary = json.loads((folder / "summary.json").read_text())
    kept = {k: v for k, v in summary.items() if not k.endswith("_s") and k != "peak_memory_bytes"}
    env = json.loads((folder / "env.json").read_text())
    return {
        "number of lines": str(len(measured)),
        "lines": sha("\n".join(measured)),
        "events": sha("\n".join(events)),
        "summary": json.dumps(kept),
        "config": sha(LIFE.sub("", (folder / "config.json").read_text())),
        "text": json.dumps(env.get("data", {}).get("train_sha256")),
        **{f"state {key}": value for key, value in state(folder).items()},
    }


def state(folder: Path) -> dict[str, str]:
    """Return a hash of each array of the newest checkpoint of a run folder."""
    import numpy as np
    import tensorstore as ts

    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    base = {"driver": "file", "path": f"{newest / 'state'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    names = sorted(key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b"/.zarray"))
    out = {"step": newest.name}
    for name in names:
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        out[name] = sha(np.asarray(ts.open(spec, read=True, open=True).result().read().result()).tobytes())
    return out


def files(folder: Path) -> dict[str, str]:
    """Return the list of all files below a folder.  A checkpoint counts as one file, named after its place from the newest.

    A worker that is told to stop saves a checkpoint, so that the older of the kept ones may be of any step.
    """
    names = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if ".sweep/xla/" in name:
            continue
        if found := re.match(r"((?:.*/)?checkpoints)/(\d+)(/|$)", name):
            steps = sorted((int(p.name) for p in (folder / found[1]).iterdir() if p.name.isdigit()), reverse=True)
            name = f"{found[1]}/newest-{steps.index(int(found[2]))}"
        names.add(name)
    return {"files": " ".join(sorted(names))}


def content(folder: Path, ignore: str = "") -> dict[str, str]:
    """Return a hash of each file below a folder, but for those whose path matches the pattern `ignore`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {
        name: sha(p.read_bytes())
        for name, p in zip(names, paths, strict=True)
        if not ignore or not re.search(ignore, name)
    }


def sweep(folder: Path) -> dict[str, str]:
    """Return the digest of a sweep folder: those of its runs, and the results table without its times."""
    out = {}
    for name in json.loads((folder / "sweep.json").read_text())["runs"]:
        out |= {f"{name}: {key}": value for key, value in run(folder / name).items()}
    with (folder / "results.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if not k.endswith("_s") and k not in ("date", "commit")}
            for row in csv.DictReader(file)
        ]
    return out | {"results": sha(json.dumps(rows)), "page": str((folder / "report.html").is_file())}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return a line for each name at which two digests differ."""
    lines = []
    for name in sorted({*one, *other}):
        a, b = one.get(name, "missing"), other.get(name, "missing")
        if a != b and name == "files":
            a, b = (" ".join(sorted(set(x.split()) - set(y.split()))) for x, y in ((a, b), (b, a)))
            lines.append(f"files: missing [{a}], more [{b}]")
        elif a != b:
            lines.append(f"{name}: {a[:60]} -> {b[:60]}")
    return lines


def attempt(function: Callable[[Path], Any], folder: Path) -> dict[str, str]:
    """Return a digest, or the error as a digest of one entry."""
    try:
        return function(folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
