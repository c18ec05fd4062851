"""Fixtures that the tests of data share: a small corpus, a trained tokenizer, a cache, and a configuration of them."""

import dataclasses
import functools
import json
import random
from pathlib import Path

import pytest

from mhc_jax import data
from mhc_jax.config import DataConfig


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache").resolve()


@pytest.fixture(autouse=True)
def cache_of_these_tests(cache, monkeypatch):
    """Texts that these tests prepare stay out of the cache that other tests share."""
    monkeypatch.setenv("MHC_JAX_CACHE", str(cache))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """60 documents of 40 to 99 words each: a small file whose windows are all different."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "corpus.jsonl"
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(40 + i)) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["the naïve façade 🙂 " * 50, *(f"It was number {i} of some hundreds.\n" for i in range(200))]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    data.train_bpe(texts, 300, path)
    return path


@pytest.fixture
def config(corpus):
    settings = DataConfig(source=str(corpus), sequence_length=16, batch_size=4)
    return functools.partial(dataclasses.replace, settings)
