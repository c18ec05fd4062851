"""Responses of a model, written to a file as they come, so that an evaluation that was stopped can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError


class Responses:
    """A file with one JSON object a line: key, response, and the tokens that the prompt lost."""

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Open the file, and read the responses that it holds.

        Args:
          path: of the file; it need not exist.
          identity: what responses depend on besides the request: checkpoint, context, tokenizer.  It is part of each key, so
            that responses of another identity are not taken for those of this one.

        Raises:
          InputError: the file cannot be read or written.
        """
        self.identity = json.dumps(identity, sort_keys=True)
        self.known: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                whole, _, torn = path.read_bytes().rpartition(b"\n")
                for line in whole.splitlines():
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry
                if torn:  # the process was killed while it wrote
                    path.write_bytes(whole + b"\n" if whole else b"")
            self._file = path.open("a")
        except (OSError, ValueError) as error:
            raise InputError(f"Cannot use {path} for responses ({error}); remove it to start again.") from error

    def key(self, kind: str, arguments: Any) -> str:
        """Return the key of a request."""
        return hashlib.sha256(json.dumps([self.identity, kind, arguments], sort_keys=True).encode()).hexdigest()

    def add(self, key: str, response: Any, truncated: int = 0) -> None:
        """Keep a response; `truncated` is the number of tokens that its prompt lost."""
        entry = {"key": key, "response": response, "truncated": truncated}
        self.known[key] = entry
        self._file.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Write the responses that were added to disk."""
        self._file.flush()

    def close(self) -> None:
        """Write the responses that were added, and close the file."""
        self._file.close()
