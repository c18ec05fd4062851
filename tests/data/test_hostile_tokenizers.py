"""Tokenizer files that lose text are refused, sizes are counted right, and long texts are cut without changing an id."""

import copy
import json
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_runs import ROOT

from mhc_jax import data
from mhc_jax.data import arrays, tokenizer_checks
from mhc_jax.data.tokenizer_checks import MOST_TOKENS
from mhc_jax.data.tokenizers import BPETokenizer
from mhc_jax.errors import InputError

TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
# The patterns of cl100k (GPT-4, Llama 3), and of DeepSeek-V3 without its first two.
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def replaced(pattern, content="", kind="String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern, behavior="Isolated", kind="Regex") -> dict:
    """A pre-tokenizer that splits at a pattern and then writes bytes as characters."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    step = {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, byte_level]}


def changed(bpe, *tokens: dict, vocab=None, **parts) -> dict:
    """The content of a trained tokenizer's file with other parts and more added tokens."""
    content = copy.deepcopy(json.loads(bpe.read_text())) | {k: v for k, v in parts.items() if k != "dropout"}
    content["model"] |= {k: v for k, v in parts.items() if k == "dropout"}
    content["model"]["vocab"] = (vocab or dict)(content["model"]["vocab"])
    content["added_tokens"] += [{"id": 300 + k, **TOKEN, **token} for k, token in enumerate(tokens)]
    return content


def loaded(content: dict) -> BPETokenizer:
    return BPETokenizer(json.dumps(content).encode(), "the file")


def without(token):
    return lambda vocab: {k: v for k, v in vocab.items() if k != token}


NORMALIZERS = {
    "Replace": [replaced("z"), replaced("[q]", kind="Regex"), replaced(" ", "_"), replaced("a", "\u2581")],
    "Prepend": [{"type": "Prepend", "prepend": "x"}],
    **{name: [{"type": name}] for name in ("NFKC", "NFD", "NFKD", "Lowercase", "StripAccents", "Nmt")},
    "Strip": [{"type": "Strip", "strip_left": True, "strip_right": True}],
}


def refused(bpe) -> dict[str, tuple[dict, str]]:
    """Files, and what is said of them."""
    again = "gives? .* back unchanged|does not give"
    cases = {
        f"{name} {k}": (changed(bpe, normalizer=step), f"its normalizer '{name}' changes text")
        for name, steps in NORMALIZERS.items()
        for k, step in enumerate(steps)
    }
    nested = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Sequence", "normalizers": [replaced("z")]}],
    }
    prefix = json.loads(bpe.read_text())["pre_tokenizer"] | {"add_prefix_space": True}
    return cases | {
        "in a sequence": (changed(bpe, normalizer=nested), "its normalizer 'Replace' changes text"),
        "dropout": (changed(bpe, dropout=0.5), "its dropout of 0.5 gives a text other ids at every call"),
        "lstrip": (
            changed(bpe, {"content": "<x>", "lstrip": True}),
            r"token '<x>' removes the white space .* \(lstrip\)",
        ),
        "rstrip": (
            changed(bpe, {"content": "<x>", "rstrip": True}),
            r"token '<x>' removes the white space .* \(rstrip\)",
        ),
        "a split that removes": (
            changed(bpe, pre_tokenizer=split("Q", "Removed")),
            "pre-tokenizer 'Split' removes text",
        ),
        "words alone": (changed(bpe, pre_tokenizer={"type": "WhitespaceSplit"}), "'WhitespaceSplit' removes text"),
        "a space before every text": (changed(bpe, pre_tokenizer=prefix), again),
        "no letter Q": (changed(bpe, vocab=without("Q")), again),
        "no byte 0xe2": (changed(bpe, vocab=without("â")), again),
        "a special token that is text": (changed(bpe, {"content": "e", "id": 69, "special": True}), again),
        "an id of 2^31": (
            changed(bpe, vocab=lambda v: v | {"zq": 2**31}),
            f"the id 2147483648 for 'zq'; .* {MOST_TOKENS}",
        ),
    }


def test_a_tokenizer_that_loses_text_is_refused_and_told_why(bpe):
    for name, (content, sentence) in refused(bpe).items():
        with pytest.raises(InputError, match=sentence) as told:
            loaded(content)
        assert "\n" not in str(told.value), name


HARMLESS = {
    "three spaces": {"content": "   "},
    "three spaces, special": {"content": "   ", "special": True},
    "three spaces, special and normalized": {"content": "   ", "special": True, "normalized": True},
    "three spaces, normalized": {"content": "   ", "normalized": True},
    "a special token beside spaces": {"content": "<x>", "special": True, "lstrip": True, "rstrip": True},
    "a word": {"content": "façade e\u0301", "single_word": True},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_added_tokens_are_counted_with_their_bytes(bpe, name):
    """As the runs of spaces in GPT-NeoX-20B's tokenizer."""
    tokenizer = loaded(changed(bpe, HARMLESS[name]))
    for text in ("a   b", "a      b\n   ", "   ", "a <x> b", "<x>", "the façade e\u0301 b", "e\u0301"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_text_of_a_tokenizer_that_normalizes_is_counted_in_its_form(bpe, tmp_path, config):
    """Qwen's and GPT-NeoX-20B's tokenizers put text into the form NFC."""
    file = tmp_path / "nfc.json"
    file.write_text(json.dumps(changed(bpe, normalizer={"type": "NFC"})))
    tokenizer, plain = data.load_tokenizer(f"bpe:{file}"), data.load_tokenizer(f"bpe:{bpe}")
    assert (tokenizer.normalizes, plain.normalizes, data.ByteTokenizer().normalizes) == (True, False, False)
    for text in ("e\u0301", "\u1100\u1161\u11a8 x", "\u212b", "a\u0323\u0308", "plain é"):
        ids, form = tokenizer.encode(text), unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids) == form
        assert tokenizer.token_bytes[ids].sum() == tokenizer.count_bytes(text) == len(form.encode())
        assert plain.count_bytes(text) == len(text.encode())
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"e\u0301 {i} " * 20}) + "\n" for i in range(40)))
    read = data.load_data(config(source=str(source), tokenizer=f"bpe:{file}"))
    for array in (read.train, read.validation):
        assert array.counts.bytes == tokenizer.token_bytes[array.tokens].sum()
    assert [line for line in read.describe(1) if "NFC" in line] == [
        "the tokenizer puts text into Unicode's form NFC; bytes are counted, and text is generated, in this form"
    ]


def test_a_text_that_comes_out_shorter_is_refused_while_it_is_tokenized(bpe, monkeypatch):
    """The samples miss a letter, as they may with a vocabulary of characters."""
    monkeypatch.setattr(tokenizer_checks, "PROBES", ("A",))
    tokenizer = loaded(changed(bpe, vocab=without("Q")))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(
        InputError, match="makes tokens of 2 bytes of a text of 3 bytes, which begins 'aQb'; it loses text"
    ):
        tokenizer.encode_batch(["ab", "aQb"])


# -- long texts

KINDS = {
    "gpt2": {},
    "nfc": {"normalizer": {"type": "NFC"}},
    "cl100k": {"pre_tokenizer": split(CL100K)},
    "deepseek": {"pre_tokenizer": split(DEEPSEEK)},
    "spaces": {"token": {"content": "   "}},
}
UNCUT = {
    "sevens": {"pre_tokenizer": split(r"[\s\S]{1,7}")},
    "look-behind": {"pre_tokenizer": split(r"(?<=a) b|\s+|\S+")},
    "whole": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    },
    "across": {"token": {"content": "the naïve"}},
}
WORDS = [
    "the",
    "naïve",
    "façade",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "don't",
    "x",
    "12",
    "é",
    ".",
    "—",
    "字",
    "🙂",
    "e\u0301",
]


def kind(bpe, parts) -> BPETokenizer:
    token = [parts["token"]] if "token" in parts else []
    return loaded(changed(bpe, *token, **{k: v for k, v in parts.items() if k != "token"}))


@pytest.fixture(scope="module")
def cutting(bpe) -> dict[str, BPETokenizer]:
    tokenizers = {name: kind(bpe, parts) for name, parts in KINDS.items()}
    assert all(tokenizer.cuts for tokenizer in tokenizers.values())
    return tokenizers


@settings(max_examples=150)
@given(st.lists(st.sampled_from([*WORDS, " word", " the", "a\nb"]), max_size=80).map("".join))
@example("the naïve façade don't\n" * 20)
def test_a_text_cut_for_tokenizing_has_the_ids_of_the_whole(cutting, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_checks, "PIECE", 20)
        for tokenizer in cutting.values():
            pieces = [*tokenizer_checks.pieces(text, tokenizer._cuts, tokenizer._ids)]
            assert "".join(pieces) == text
            assert tokenizer.encode(text).tolist() == tokenizer._ids(text)


def test_pieces_of_a_long_text_are_short(cutting, monkeypatch):
    monkeypatch.setattr(tokenizer_checks, "PIECE", 100)
    for text in ("the naïve façade " * 100, "字字字。\n字字\n" * 100):
        for name, tokenizer in cutting.items():
            pieces = [*tokenizer_checks.pieces(text, tokenizer._cuts, tokenizer._ids)]
            assert max(map(len, pieces)) < 120, name
            assert len(pieces) > 5
            assert np.array_equal(tokenizer.encode(text), tokenizer._ids(text))


def test_a_tokenizer_whose_text_cannot_be_cut_gets_it_whole_and_says_so(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_checks, "PIECE", 20)
    text = "the naïve façade don't 12, 字 " * 20
    golden = data.load_tokenizer(f"hf:{ROOT}/tests/support/golden/mistral")
    for tokenizer in (golden, *(kind(bpe, parts) for parts in UNCUT.values())):
        assert not tokenizer.cuts
        assert [*tokenizer_checks.pieces(text, tokenizer._cuts, tokenizer._ids)] == [text]
        assert tokenizer.encode(text).tolist() == tokenizer._ids(text)
    (tmp_path / "a.txt").write_text(text)
    told = []
    show = lambda work: told.append(work) or arrays.show_nothing(work)  # noqa: E731
    arrays.token_array(str(tmp_path / "a.txt"), "train", golden, cache=tmp_path, fraction=0.0, show=show)
    assert re.search("each document at once, with about 150 bytes of memory for each of its bytes", told[0])


@pytest.mark.full
def test_a_document_of_15_mb_takes_bounded_memory(bpe):
    """It took 2.2 GB in one piece."""
    code = (
        "import resource, sys; from mhc_jax import data\n"
        f"tokenizer = data.load_tokenizer('bpe:{bpe}')\n"
        "text = 'the naive facade number of some hundreds. ' * 370_000\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tokenizer.encode(text)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    assert int(done.stdout) < 700_000  # KiB
