"""Read and write safetensors files: arrays by name, in one file or in shards that an index lists."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.errors import InputError, require, shown
from mhc_jax.files.aside import aside
from mhc_jax.files.checksums import CHECKSUMS, damage, write_checksums
from mhc_jax.files.json_files import read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the file with all arrays, and of the index of shards that stands in its place."""
READABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that are read, as safetensors spells them."""


class TensorFiles:
    """The arrays of a folder, by name.  An array is read from its file when `take` asks for it.

    Raises:
      InputError: the folder has neither `model.safetensors` nor its index, or a file is damaged or missing.  Files of a folder
        that `write_folder` wrote are compared with their checksums.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        names = [FILE]
        if index.is_file():
            listed = read_json(index).get("weight_map")
            files = list(listed.values()) if isinstance(listed, dict) else []
            require(bool(files) and all(isinstance(f, str) for f in files), f"{index} lists no files under weight_map.")
            names = sorted({*files})
        self._specs: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self.metadata: dict[str, str] = {}
        for name in names:
            with self._opened(name) as file:
                self.metadata |= file.metadata() or {}
                for key in file.keys():  # noqa: SIM118  `file` is no dict and cannot be iterated
                    part = file.get_slice(key)
                    self._specs[key] = (name, tuple(part.get_shape()), part.get_dtype())
        reason = damage(self.folder)
        require(
            not reason,
            f"{self.folder}: {reason}; write the folder again, or remove {self.folder / CHECKSUMS} to use the files as they are.",
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array, by name."""
        return {key: shape for key, (_, shape, _) in self._specs.items()}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the array `name` in its own dtype (bfloat16 as ml_dtypes' type).

        Raises:
          InputError: there is no such array, or it has another shape, or a dtype that is not in `READABLE`.
        """
        require(name in self._specs, f"{name} is missing from {self.folder}; it should have the shape {list(shape)}.")
        file_name, found, dtype = self._specs[name]
        require(
            found == shape,
            f"{name} in {self.folder / file_name} has the shape {list(found)}, and {list(shape)} was expected.",
        )
        require(
            dtype in READABLE,
            f"{name} in {self.folder / file_name} is of the dtype {dtype}, and not of {', '.join(READABLE)}; convert it first (fp8 "
            "needs its scales for that).",
        )
        with self._opened(file_name) as file:
            return file.get_tensor(name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        try:
            with safe_open(path, framework="np") as file:
                yield file
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        except UnicodeEncodeError:
            raise InputError(f"{shown(str(path))} is not valid Unicode, so that there is no such file.") from None
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}.") from error


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their paths, such as `layers/attention/W_q`."""
    out = {}
    for key, value in tree.items():
        out |= flattened(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts of which `flattened` makes `flat`."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        inner = out
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return out


def write_folder(
    folder: str | Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write a folder with `model.safetensors` and other files.  A kill leaves no folder of that name.

    Args:
      folder: a folder that does not exist yet, or is empty.
      arrays: arrays by name.
      texts: content of other files by name, as text or as JSON values.
      metadata: texts for the header of the safetensors file.

    Raises:
      InputError: the folder holds something, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = Path(folder)
    require_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with aside(folder.parent, folder.name) as temporary:
            # safetensors stores the memory of an array as it lies there, so that a transposed array is copied first.
            save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, temporary / FILE, dict(metadata))
            _sort_metadata(temporary / FILE)
            (temporary / FILE).chmod(0o644)  # safetensors gives rights to the owner alone
            for name, content in texts.items():
                _write_text(temporary / name, content)
            write_checksums(temporary)
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def _sort_metadata(path: Path) -> None:
    """Put the texts of a header in the order of their names: safetensors writes them in another order in each process."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise OSError("the header of the safetensors file has another form than expected")
        file.seek(8)
        file.write(text.ljust(size))


def _write_text(path: Path, content: Any) -> None:
    """Write a text, or JSON values."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def require_free(folder: Path) -> None:
    """Raise `InputError` unless the folder does not exist or is empty."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(free, f"{folder} exists and is not empty; give a new folder.")
