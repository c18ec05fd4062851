"""Store each response of a model in a file as soon as it is computed, so that an evaluation that was stopped can continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError
from mhc_jax.runs.lock import run_lock
from mhc_jax.runs.trackers import warn


class Responses:
    """A store of responses in a file of JSON lines, each with the fields `key`, `response` and `truncated`.

    `truncated` is the number of tokens that were cut off at the beginning of the prompt.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Open the file of responses, and read the responses that it holds.

        Args:
          path: path of the file, which need not exist.
          identity: step of the checkpoint, tokenizer and context length, on which responses depend besides the request.  It is
            part of each key, so that a response under another identity is never returned.

        The store holds the lock of the file's folder until it is closed.  Lines that are damaged are told and left out, so that
        their responses are computed again.

        Raises:
          Busy: another process evaluates the same checkpoint.
          InputError: the file cannot be read or written.
        """
        self.identity = json.dumps(identity, sort_keys=True)
        self.known: dict[str, dict[str, Any]] = {}
        self._lock = contextlib.ExitStack()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(run_lock(path.parent))
            if path.exists():
                whole, _, torn = path.read_bytes().rpartition(b"\n")
                damaged = 0
                for line in whole.split(b"\n"):
                    try:
                        entry = json.loads(line.decode())
                        self.known[entry["key"]] = {key: entry[key] for key in ("key", "response", "truncated")}
                    except (ValueError, TypeError, KeyError, RecursionError):
                        damaged += bool(line.strip())
                if damaged:
                    warn(f"{damaged} lines of {path} are damaged; their responses are computed again.")
                if torn:  # a process was killed while it wrote the last line
                    path.write_bytes(whole + b"\n" if whole else b"")
            self._file = path.open("a")
        except OSError as error:
            self._lock.close()
            raise InputError(f"Cannot use {path} for responses ({error}); remove it to start again.") from error

    def key(self, kind: str, arguments: Any) -> str:
        """Return the key of a request, a hash of the store's identity, the kind of request and its arguments."""
        return hashlib.sha256(json.dumps([self.identity, kind, arguments], sort_keys=True).encode()).hexdigest()

    def add(self, key: str, response: Any, truncated: int = 0) -> None:
        """Add a response to the store.  `truncated` is the number of tokens that were cut off at the beginning of its prompt."""
        entry = {"key": key, "response": response, "truncated": truncated}
        self.known[key] = entry
        self._file.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Write to the file the responses that have been added."""
        self._file.flush()

    def close(self) -> None:
        """Write to the file the responses that have been added, and close it."""
        self._file.close()
        self._lock.close()
