"""What is known and said of the two splits of a text: its identity, and what is odd about them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from mhc_jax import data
from mhc_jax.config import DataConfig
from mhc_jax.data import sources


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """60 documents of 40 to 99 words each."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(40 + i)) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(corpus, tmp_path):
    def make(**changes) -> DataConfig:
        settings = {"source": str(corpus), "cache_dir": str(tmp_path / "cache"), "sequence_length": 16}
        return DataConfig(**{**settings, "batch_size": 4, **changes})

    return make


def warned(settings, count=1) -> list[str]:
    return [line for line in data.load_data(settings).describe(count) if line.startswith("warning: ")]


def test_the_identity_of_a_text_is_neither_its_place_nor_its_cache(tmp_path, config, corpus):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(corpus.read_bytes())
    first, same = (data.load_data(c) for c in (config(), config(source=str(moved), cache_dir=str(tmp_path))))
    assert first.identity == same.identity
    moved.write_text(corpus.read_text().replace("7", "8", 1))
    assert data.load_data(config(source=str(moved), cache_dir=str(tmp_path))).identity != first.identity


def test_a_glob_of_files_named_like_splits_is_warned_of(tmp_path, config):
    """Each file is one document: which is held out, the hash of its text decides."""
    for name, words in (("train", 3000), ("valid", 40), ("test", 40)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(words)))
    named, share = "warning: data.source holds test.txt, valid.txt, yet", "% of all tokens are held out for validation"
    told = warned(config(source=f"{tmp_path}/*.txt"))
    assert [line for line in told if named in line]
    alone = config(source=f"{tmp_path}/train.txt", validation_source=f"{tmp_path}/valid.txt")
    assert warned(alone) == []
    turned = config(source=f"{tmp_path}/valid.txt", validation_source=f"{tmp_path}/train.txt")
    assert [line for line in warned(turned) if share in line] == warned(turned) != []


def test_more_held_out_than_was_asked_for_is_warned_of(config, monkeypatch):
    assert warned(config()) == warned(config(validation_fraction=0.4)) == []
    monkeypatch.setattr(sources, "position", lambda text: 0.04 if text[0] in "123" else 0.5)
    cache = {"cache_dir": f"{config().cache_dir}/odd"}
    (line,) = warned(config(**cache))
    assert re.fullmatch(
        r"warning: \d\d% of all tokens are held out for validation, though data.validation_fraction is .*", line
    )
    assert len(warned(config(**cache), count=10**6)) == 2


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train-00.jsonl", "valid-00.jsonl"], ["valid-00.jsonl"]),
        (["train/a.txt", "test/a.txt"], ["a.txt"]),
        (["latest.txt", "development.txt", "valley.txt"], []),
        (["test.txt"], []),
    ],
)
def test_names_of_splits(files, found, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    assert sources.named_like_splits(f"{tmp_path}/**/*.*") == found
