"""What the tests of data share: a small corpus, the prepared one, a trained tokenizer, and a cache of them."""

from pathlib import Path

import pytest
from support.tiny_runs import write_corpus

from mhc_jax import data
from mhc_jax.config import DataConfig


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache").resolve()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus.jsonl")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["the naïve façade 🙂 " * 50, *(f"It was number {i} of some hundreds.\n" for i in range(200))]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    data.train_bpe(texts, 300, path)
    return path


@pytest.fixture
def config(corpus, cache):
    def make(**changes) -> DataConfig:
        settings = {"source": str(corpus), "cache_dir": str(cache), "sequence_length": 16, "batch_size": 4}
        return DataConfig(**settings | changes)

    return make
