"""Token arrays hold every document even where the cache is damaged, and the order of batches depends on the settings alone."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import ROOT

from mhc_jax import data
from mhc_jax.config import DataConfig
from mhc_jax.data import arrays, batches, shakespeare
from mhc_jax.errors import InputError


def take(iterator, count: int) -> np.ndarray:
    return np.stack([next(iterator)["inputs"] for _ in range(count)])


@pytest.mark.parametrize("spec", ["byte", "bpe"])
def test_array_holds_every_document_and_its_end(spec, bpe, corpus, cache):
    tokenizer = data.load_tokenizer(spec if spec == "byte" else f"bpe:{bpe}")
    for split in ("train", "validation"):
        array = arrays.token_array(str(corpus), split, tokenizer, cache=cache)
        texts = [document.text for document in data.documents(str(corpus), split, cache=cache)]
        ids = [id for text in texts for id in (*tokenizer.encode(text).tolist(), tokenizer.end_of_document)]
        assert array.tokens.tolist() == ids
        size = sum(len(text.encode()) for text in texts)
        digest = hashlib.sha256(b"".join(id.to_bytes(2, "little") for id in ids)).hexdigest()
        assert array.counts == arrays.Counts(len(texts), len(array.tokens), size, digest)
        assert array.tokens.dtype == np.uint16
        assert not array.tokens.flags.writeable


def test_tokenizing_tells_what_is_done(tmp_path):
    """Four documents of 3 MB, in chunks of two; a second call has nothing to tokenize."""
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{letter * 3_000_000}"}}\n' for letter in "abcd"))
    told = []

    @contextlib.contextmanager
    def show(work):
        told.append(work)
        yield told.append

    for _ in range(2):
        arrays.token_array(
            str(tmp_path / "text.jsonl"), "train", data.ByteTokenizer(), cache=tmp_path, fraction=0.0, show=show
        )
    assert told == [
        f"tokenizing the training text of '{tmp_path}/text.jsonl'",
        "2 documents, 6 MB",
        "4 documents, 12 MB",
    ]


def test_cache_is_reused_and_keyed_by_content(tmp_path, corpus, bpe, monkeypatch):
    source = tmp_path / "copy.jsonl"
    source.write_bytes(corpus.read_bytes())
    byte = data.ByteTokenizer()
    first = arrays.token_array(str(source), "train", byte, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_store", lambda *args: pytest.fail("tokenized again"))
        second = arrays.token_array(str(source), "train", byte, cache=tmp_path)
        assert np.array_equal(first.tokens, second.tokens)
        assert first.counts == second.counts
        others = ("validation", byte, 0.05), ("train", data.load_tokenizer(f"bpe:{bpe}"), 0.05), ("train", byte, 0.1)
        for split, tokenizer, fraction in others:
            with pytest.raises(pytest.fail.Exception, match="tokenized again"):
                arrays.token_array(str(source), split, tokenizer, cache=tmp_path, fraction=fraction)
    with source.open("a") as file:
        file.write('{"text": "one more document"}\n')
    third = arrays.token_array(str(source), "train", byte, cache=tmp_path)
    assert third.counts.documents == first.counts.documents + 1
    times = source.stat().st_mtime_ns
    source.write_text(source.read_text().replace("more", "last"))
    os.utime(source, ns=(times, times + 1))
    fourth = arrays.token_array(str(source), "train", byte, cache=tmp_path)
    assert (fourth.counts.bytes, fourth.counts.sha256 != third.counts.sha256) == (third.counts.bytes, True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "half a meta", "no meta", "no array"])
def test_damaged_cache_is_rebuilt(tmp_path, corpus, damage):
    byte = data.ByteTokenizer()
    expected = np.array(arrays.token_array(str(corpus), "train", byte, cache=tmp_path).tokens)
    array = next((tmp_path / "tokens").glob("*.npy"))
    meta = array.with_suffix(".json")
    content = array.read_bytes()
    {
        "truncated": lambda: array.write_bytes(content[:-100]),
        "flipped": lambda: array.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]),
        "half a meta": lambda: meta.write_text('{"documents": 1'),
        "no meta": meta.unlink,
        "no array": array.unlink,
    }[damage]()
    rebuilt = arrays.token_array(str(corpus), "train", byte, cache=tmp_path)
    assert np.array_equal(rebuilt.tokens, expected)
    assert sorted(path.suffix for path in (tmp_path / "tokens").iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_folder_in_the_place_of_a_cached_file_is_a_sentence_that_names_it(tmp_path, corpus, suffix):
    byte = data.ByteTokenizer()
    arrays.token_array(str(corpus), "train", byte, cache=tmp_path)
    file = next((tmp_path / "tokens").glob(f"*{suffix}"))
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=rf"cannot be written to {file}: "):
        arrays.token_array(str(corpus), "train", byte, cache=tmp_path)


def test_a_build_in_the_middle_of_another_is_the_same(tmp_path, monkeypatch):
    """A second build of the prepared set and of the token array begins and ends while the first one writes."""
    inner, built = [], []

    def interrupted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if name not in inner:
                inner.append(name)
                built.append(arrays.token_array("shakespeare", "validation", data.ByteTokenizer(), cache=tmp_path))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    interrupted(shakespeare.Shakespeare, "download_and_prepare")
    interrupted(arrays, "_write")
    built.append(arrays.token_array("shakespeare", "validation", data.ByteTokenizer(), cache=tmp_path))
    assert len(built) == 3
    for array in built[1:]:
        assert array.counts == built[0].counts
        assert np.array_equal(array.tokens, built[0].tokens)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def build(source: str, cache: str, results) -> None:
    array = arrays.token_array(source, "train", data.ByteTokenizer(), cache=Path(cache))
    results.put((array.counts.tokens, int(array.tokens.astype(np.int64).sum())))


@pytest.mark.full
def test_processes_may_build_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # tfds leaves empty folders there
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=build, args=("shakespeare", str(tmp_path), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({results.get(timeout=600) for _ in workers}) == 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    results.close()
    results.join_thread()
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_unwritable_cache(tmp_path, corpus, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"cache folder .*file/below cannot be written .*set \$MHC_JAX_CACHE"):
        data.load_data(DataConfig(source=str(corpus)))
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path / "from-environment"))
    assert data.cache_folder() == (tmp_path / "from-environment").resolve()


def test_every_epoch_visits_each_pair_of_windows_once_in_a_new_order(config):
    loaded = data.load_data(config(batch_size=1))
    windows = (len(loaded.train.tokens) - 1) // 16
    assert windows > 100
    iterator, drawn = loaded.train_iterator(), []
    for _ in range(2 * windows):
        batch = next(iterator)
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert batch["inputs"].shape == batch["targets"].shape == (1, 16)
        assert np.array_equal(batch["inputs"][0, 1:], batch["targets"][0, :-1])
        drawn.append([*batch["inputs"][0].tolist(), int(batch["targets"][0, -1])])
    iterator.close()
    first, second = drawn[:windows], drawn[windows:]
    in_text = [loaded.train.tokens[i * 16 : i * 16 + 17].tolist() for i in range(windows)]
    assert sorted(first) == sorted(second) == sorted(in_text)
    assert first != second
    assert in_text not in (first, second)


def test_order_depends_on_the_seed_alone(config):
    first = take(data.load_data(config()).train_iterator(), 20)
    np.random.seed(7)
    random.seed(7)
    assert np.array_equal(first, take(data.load_data(config(tokenizer="byte")).train_iterator(), 20))
    assert not np.array_equal(first, take(data.load_data(config(seed=1)).train_iterator(), 20))


def test_resume_is_exact(config):
    loaded = data.load_data(config())
    steps = 2 * (len(loaded.train.tokens) - 1) // 16 // 4 + 3  # into the third epoch
    iterator = loaded.train_iterator()
    take(iterator, steps)
    state = json.dumps(iterator.get_state())
    assert len(state) < 100
    expected = take(iterator, 5)
    fresh = loaded.train_iterator()
    next(fresh)
    fresh.set_state(json.loads(state))
    assert np.array_equal(take(fresh, 5), expected)
    assert np.array_equal(take(loaded.train_iterator(start_step=steps), 5), expected)
    iterator.set_state(json.loads(state))
    assert np.array_equal(take(iterator, 5), expected)


def test_a_far_step_is_reached_without_reading_what_lies_before(config, monkeypatch):
    """An iterator that starts at step 10^9 cuts no more batches than it reads ahead."""
    cut, real = [], batches._cutter

    def counting(*args):
        cutter = real(*args)
        return lambda windows: cut.append(len(windows)) or cutter(windows)

    monkeypatch.setattr(batches, "_cutter", counting)
    far = data.load_data(config()).train_iterator(start_step=10**9)
    next(far)
    assert far.get_state() == {"next_index": 10**9 + 1}
    far.close()
    assert 1 <= len(cut) <= 4  # the one that is drawn, two ahead, and one on its way
    assert {*cut} == {4}


def test_iterators_leave_no_thread(config):
    loaded = data.load_data(config())
    before = {*threading.enumerate()}
    iterator = loaded.train_iterator()
    next(iterator)
    started = {*threading.enumerate()} - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=600)  # a hang becomes a failure
    assert not {*threading.enumerate()} - before


def test_interpreter_exits_with_an_open_iterator(config):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from types import SimpleNamespace\n"
        "from mhc_jax import data\n"
        f"loaded = data.load_data(SimpleNamespace(**{vars(config())!r}))\n"
        "iterator = loaded.train_iterator(); next(iterator); print('drawn')\n"
        "print('tensorflow' in sys.modules)\n"
    )
    script = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "drawn\nFalse\n")


def test_validation_batches_are_consecutive(config):
    loaded = data.load_data(config(validation_fraction=0.4))
    batches = loaded.validation_batches(3)
    assert [batch["inputs"].shape for batch in batches] == [(4, 16)] * 3
    for key, first in (("inputs", 0), ("targets", 1)):
        joined = np.concatenate([batch[key].ravel() for batch in batches])
        assert np.array_equal(joined, loaded.validation.tokens[first : first + 3 * 4 * 16])
    batches = loaded.validation_batches(10**9)
    assert len(batches) == (len(loaded.validation.tokens) - 1) // 16 // 4
    ends = sum(np.count_nonzero(batch["targets"] == 256) for batch in batches)
    assert ends > 5
    assert loaded.target_bytes(batches) == len(batches) * 4 * 16 - ends
    by_hand = {"inputs": np.full((1, 2), 256), "targets": np.array([[65, 256]])}
    assert loaded.target_bytes([by_hand]) == 1, "bytes of the targets, not of the inputs"


def test_short_validation_text_fills_one_batch(tmp_path, config):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("0123456789abcdef" * 2 + "!")
    loaded = data.load_data(config(validation_source=str(held_out)))
    (batch,) = loaded.validation_batches(8)
    assert "warning: the validation text fills no batch, so that it is repeated until it does." in loaded.describe(8)
    assert batch["inputs"].shape == (4, 16)
    assert np.array_equal(batch["inputs"][:2], batch["inputs"][2:])
    assert [loaded.tokenizer.decode(ids) for ids in batch["targets"][:2]] == ["123456789abcdef0", "123456789abcdef!"]


def test_validation_source_leaves_all_documents_for_training(tmp_path, config, corpus):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("x" * 100)
    loaded = data.load_data(config(validation_source=str(held_out)))
    assert loaded.train.counts.documents == 60
    assert (loaded.validation.counts.documents, loaded.validation.counts.bytes) == (1, 100)
    with pytest.raises(InputError, match=r"is in data\.source and in data\.validation_source"):
        data.load_data(config(validation_source=str(corpus)))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    with pytest.raises(InputError, match=r"The training text .* and the validation text .*copy.jsonl' are the same"):
        data.load_data(config(validation_source=str(copy)))


@pytest.mark.parametrize("spec", ["byte", "bpe"])
def test_summary(spec, config, bpe, corpus):
    tokenizer = spec if spec == "byte" else f"bpe:{bpe}"
    loaded = data.load_data(config(tokenizer=tokenizer))
    summary = loaded.summary()
    assert json.loads(json.dumps(summary)) == summary
    found = [summary[key] for key in ("source", "tokenizer", "vocab_size", "fingerprint")]
    assert found == [str(corpus), tokenizer, 264 if spec == "byte" else 300, loaded.tokenizer.fingerprint]
    assert summary["train_documents"] + summary["validation_documents"] == 60
    tokens = loaded.validation.tokens
    size = loaded.tokenizer.token_bytes[tokens].sum()
    assert (summary["validation_tokens"], summary["validation_bytes"]) == (len(tokens), size)
    assert loaded.identity == {key: summary[key] for key in ("train_sha256", "validation_sha256")}


def test_shakespeare_by_default():
    loaded = data.load_data(DataConfig())
    summary = loaded.summary()
    assert (summary["train_documents"], summary["validation_documents"]) == (36, 2)
    assert summary["train_tokens"] + summary["validation_tokens"] == 4_998_214 + 38
    assert summary["train_bytes"] + summary["validation_bytes"] == 4_998_214
    assert len(loaded.validation_batches(8)) == 8


@pytest.mark.parametrize(("split", "key"), [("training", "source"), ("validation", "validation_source")])
def test_text_shorter_than_a_window(tmp_path, config, split, key):
    path, long = tmp_path / "short.txt", tmp_path / "long.txt"
    long.write_text("x" * 100)
    sources = {"source": str(long), "validation_source": str(long), key: str(path)}
    path.write_text("fifteen letters")
    sentence = f"The {split} text of '{path}' has 16 tokens in 1 documents, but one window needs .* = 17"
    with pytest.raises(InputError, match=sentence):
        data.load_data(config(**sources))
    path.write_text("sixteen letters!")
    assert data.load_data(config(**sources))


def test_one_document_cannot_be_split(tmp_path, config):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "x" * 1000}))
    with pytest.raises(InputError, match=r"training text .* has 0 tokens in 0 documents"):
        data.load_data(config(source=str(path)))
