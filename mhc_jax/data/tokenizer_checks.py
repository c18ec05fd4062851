"""Checks of tokenizer files: which are refused because they would lose text, and which texts may be cut for tokenizing.

A tokenizer is lossless if decoding its ids gives the text back, and if the sizes of its tokens add up to the bytes of the text.
Parts that lose text are found in the file (`refusal`).  Sample texts are then encoded (`require_lossless`), and every text that is
tokenized later is checked for its number of bytes (`BPETokenizer.encode_batch`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_jax.errors import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PROBE = " A\n\n\tnaïve—façade  🙂 <|endoftext|> 123\r\n"
"""Text that a lossless tokenizer gives back unchanged."""
MOST_TOKENS = 1 << 22
"""Ids of tokens are below this number.  The largest vocabularies of published models have 3e5 tokens."""
PIECE = 1 << 18
"""Number of characters from which on a text is cut for tokenizing.

The tokenizers library takes about 125 bytes of memory for each byte of a text."""

_DECOMPOSED = "e\u0301 a\u0308\u0323 \u1100\u1161 \u212b \u2126 \ufb01 \uff21 \ufdfa \u0958"
_ANY = "".join(map(chr, range(1, 0x800)))
_WIDE = "".join(chr(lead << 12 | 0x234) for lead in range(16) if lead != 0xD) + "".join(
    chr(lead << 18 | 0x1F00) for lead in range(1, 4)
)
_SPACES = " ".join(f"a{space * k}b" for space in " \t\n\r" for k in range(1, 33))
PROBES = (PROBE, PROBE.lstrip(), _DECOMPOSED, _ANY, _WIDE, _SPACES)
"""Texts that every tokenizer is tried on: both forms of accents, every byte that UTF-8 can have, and runs of white space."""

_REMOVING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
_SPLITTING = ("ByteLevel", "Split", "Digits", "Punctuation")
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGKzZ]|(?<!\[)\^|\$")
_CUTS = (re.compile(r"(?<=\S)(?= [^\W\d_])"), re.compile(r"(?<=\S\n)(?=[^\W\d_])"))
"""Where a text may be cut: before a space that stands between a visible character and a letter, or after a single line end."""
_WINDOW = 4096


def steps(part: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the parts of a normalizer or pre-tokenizer of a tokenizer file, those of sequences one by one.

    >>> steps({"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "normalizers")
    [{'type': 'NFC'}]
    """
    if not isinstance(part, Mapping):
        return []
    return [s for p in part[name] for s in steps(p, name)] if isinstance(part.get(name), list) else [part]


def normalizers(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the normalizers in a tokenizer file."""
    return steps(described.get("normalizer"), "normalizers")


def refusal(described: Mapping[str, Any]) -> str:
    """Return why a tokenizer file is refused, as the end of a sentence, or an empty text.

    Args:
      described: content of the file.
    """
    for step in normalizers(described):
        sentencepiece = step == {"type": "Prepend", "prepend": "\u2581"} or step == {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": "\u2581",
        }
        if step.get("type") not in ("NFC", "ByteLevel") and not sentencepiece:
            return f"its normalizer {step.get('type')!r} changes text"
    for step in steps(described.get("pre_tokenizer"), "pretokenizers"):
        removes = step.get("behavior") == "Removed" and not step.get("invert")
        if step.get("type") in _REMOVING or removes:
            return f"its pre-tokenizer {step.get('type')!r} removes text"
    model = described.get("model")
    if isinstance(model, Mapping) and model.get("dropout"):
        return f"its dropout of {model['dropout']} gives a text other ids at every call"
    for token in described.get("added_tokens") or []:
        beside = [side for side in ("lstrip", "rstrip") if token.get(side) and not token.get("special")]
        if beside:
            return f"its added token {token.get('content')!r} removes the white space beside it ({beside[0]})"
    return ""


def require_lossless(
    name: str, backend: Backend, sizes: np.ndarray, normalized: Callable[[str], str], end: str
) -> None:
    """Raise `InputError` if a tokenizer loses or miscounts a sample text or one of its own added tokens.

    Args:
      name: name of the tokenizer in the message.
      backend: the tokenizer.
      sizes: number of bytes of each token [V].
      normalized: function that returns a text as the tokenizer reads it.
      end: name of the end-of-document token.
    """
    texts = [*PROBES, f"a {end} b"]
    for token in backend.get_added_tokens_decoder().values():
        decoded = backend.decoder.decode([token.content]) if backend.decoder else token.content
        spelled = dict.fromkeys((token.content, decoded))
        texts += [f"{beside}{text}{beside}" for text in spelled for beside in ("", "a", " ")]
    for text, encoded in zip(texts, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        read = normalized(text)
        spare = int(sizes[encoded.ids].sum()) - len(read.encode())
        require(
            backend.decode(encoded.ids) == read and spare in (0, 1),
            f"The tokenizer {name!r} is not lossless: it does not give {_shown(text)} back unchanged; train one with "
            "experiments/tokenizer.py.",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 50 else f"{text[:40]}...")


def token_sizes(name: str, backend: Backend) -> np.ndarray:
    """Return the number of bytes of each token, int32 [V], 0 for special tokens.

    Byte-level BPE writes each byte of a token as one character.  SentencePiece writes a space as U+2581 and a single byte as
    `<0xFF>`.  Added tokens are plain text in both.

    Raises:
      InputError: an id is not below `MOST_TOKENS`.
    """
    from tokenizers import decoders

    byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    token = max(vocabulary, key=vocabulary.__getitem__)
    require(
        vocabulary[token] < MOST_TOKENS,
        f"The tokenizer {name!r} has the id {vocabulary[token]} for {_shown(token)}; ids must be below {MOST_TOKENS}: number "
        "its tokens from 0 on.",
    )
    lengths = np.zeros(vocabulary[token] + 1, np.int32)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)
        else:
            single = re.fullmatch("<0x[0-9A-F]{2}>", token)
            lengths[index] = 1 if single else len(token.replace("\u2581", " ").encode())
    return lengths


def cuts_of(described: Mapping[str, Any], backend: Backend) -> list[re.Pattern[str]]:
    """Return the patterns of places at which a tokenizer always ends one token and begins another, whatever stands around them.

    A text that is cut there has the ids of its pieces.  There are none unless the tokenizer splits texts into words by patterns
    that do not look back.  Whether a place always separates words is tried on samples.

    Args:
      described: content of the tokenizer file.
      backend: the tokenizer.
    """
    splits = steps(described.get("pre_tokenizer"), "pretokenizers")
    patterns = [pattern for step in splits if isinstance(pattern := step.get("pattern"), Mapping)]
    looks_back = any(_LOOKS_BACK.search(str(p.get("Regex", "")).replace(r"\s+$", "")) for p in patterns)
    across = [t for t in described.get("added_tokens") or [] if re.search(r"\S\s", str(t.get("content")))]
    known = all(step.get("type") in _SPLITTING for step in splits)
    changed = any(step.get("type") != "NFC" for step in normalizers(described))
    if not splits or not known or looks_back or across or changed:
        return []

    def separates(before: str, after: str) -> bool:
        words = backend.pre_tokenizer.pre_tokenize_str(before + after)
        return any(start == len(before) for _, (start, _) in words)

    ends = [
        f"{word}{end}"
        for word in ("", "x", "the ", "  ", "12")
        for end in ("a", "Z", "é", "9", ".", "'", "—", "字", "🙂", "_")
    ]
    starts = [f"{letter}{rest}" for letter in ("a", "Zé", "é", "字") for rest in ("", "b", "'s the", "  \n x", "9.")]
    pairs = list(itertools.product(ends, starts))
    space, line = _CUTS
    return [space] * all(separates(a, f" {b}") for a, b in pairs) + [line] * all(
        separates(f"{a}\n", b) for a, b in pairs
    )


def pieces(text: str, cuts: Iterable[re.Pattern[str]], encode: Callable[[str], list[int]]) -> Iterator[str]:
    """Yield a text in pieces of about `PIECE` characters whose ids, joined, are those of the text.

    Args:
      text: the text.
      cuts: the result of `cuts_of`.  Without any, the whole text is one piece.
      encode: function that returns the ids of a text, which checks each cut once more on the text around it.
    """
    cuts, start = list(cuts), 0
    while cuts and len(text) - start > PIECE:
        places = (m.start() for m in _places(text, start + PIECE, cuts))
        cut = next((place for place in places if _separates(text, place, encode)), len(text))
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


def _places(text: str, start: int, cuts: Iterable[re.Pattern[str]]) -> Iterator[re.Match[str]]:
    """Yield the places from `start` on at which a text may be cut, window by window."""
    for left in range(start, len(text), _WINDOW):
        for pattern in cuts:
            yield from pattern.finditer(text, left, left + _WINDOW)


def _separates(text: str, place: int, encode: Callable[[str], list[int]]) -> bool:
    before, after = text[max(place - 100, 0) : place], text[place : place + 100]
    return encode(before + after) == encode(before) + encode(after)
