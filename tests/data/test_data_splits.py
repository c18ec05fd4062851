"""A run records the identity of its text, warns of unusual splits, and refuses to continue with another text."""

import json
import re

import pytest
from support.ends import at_read_of, kill_at, train_until_killed
from support.shared_programs import shared_programs  # noqa: F401
from support.tiny_runs import data_of, tiny, write_text

from mhc_jax import data
from mhc_jax.config.mapping import to_mapping
from mhc_jax.data import sources
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.runs.checkpoint import check_text
from mhc_jax.sweeps.grid import Grid, plan, seeds
from mhc_jax.sweeps.runner import prepare


def warned(settings, count=1) -> list[str]:
    return [line for line in data.load_data(settings).describe(count) if line.startswith("warning: ")]


def test_the_identity_of_a_text_is_neither_its_place_nor_its_cache(tmp_path, config, corpus, monkeypatch):
    first, moved = data.load_data(config()), tmp_path / "elsewhere.jsonl"
    moved.write_bytes(corpus.read_bytes())
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path))
    assert data.load_data(config(source=str(moved))).identity == first.identity
    moved.write_text(corpus.read_text().replace("7", "8", 1))
    assert data.load_data(config(source=str(moved))).identity != first.identity


def test_a_glob_of_files_named_like_splits_is_warned_of(tmp_path, config):
    """Each file is one document, and the hash of its text decides whether it is held out."""
    for name, words in (("train", 3000), ("valid", 40), ("test", 40)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(words)))
    named, share = "warning: data.source holds test.txt, valid.txt, yet", "% of all tokens are held out for validation"
    told = warned(config(source=f"{tmp_path}/*.txt"))
    assert [line for line in told if named in line]
    alone = config(source=f"{tmp_path}/train.txt", validation_source=f"{tmp_path}/valid.txt")
    assert warned(alone) == []
    turned = config(source=f"{tmp_path}/valid.txt", validation_source=f"{tmp_path}/train.txt")
    assert [line for line in warned(turned) if share in line] == warned(turned) != []


def test_more_held_out_than_was_asked_for_is_warned_of(config, monkeypatch, tmp_path):
    assert warned(config()) == warned(config(validation_fraction=0.4)) == []
    monkeypatch.setattr(sources, "position", lambda text: 0.04 if text[0] in "123" else 0.5)
    monkeypatch.setenv("MHC_JAX_CACHE", str(tmp_path))
    (line,) = warned(config())
    share = r"warning: \d\d% of all tokens are held out for validation, though data.validation_fraction is .*"
    assert re.fullmatch(share, line)
    assert len(warned(config(), count=10**6)) == 2


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


def changed(text):
    text.write_text(text.read_text().replace("stream", "DREAMS"))


def test_a_run_does_not_go_on_with_another_text(tmp_path, monkeypatch):
    config = tiny(text := write_text(tmp_path / "text.txt"), "residual")
    train_until_killed(config, tmp_path / "run", "read", at_read_of(5))
    before, files = text.read_text(), {p.name for p in (tmp_path / "run").rglob("*")}
    changed(text)
    with monkeypatch.context() as patch:
        kill_at(patch, "compile_programs")
        with pytest.raises(InputError, match=r"The training text is not the one that .*run was trained with \(SHA-256"):
            train(config, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").rglob("*")} == files
    text.write_text(before)  # the same text in a file of another time
    assert train(config, tmp_path / "run")["status"] == "finished"


def test_a_run_that_starts_anew_says_and_records_the_text_that_it_reads(tmp_path, capsys):
    config = tiny(text := write_text(tmp_path / "text.txt"), "residual")
    train_until_killed(config, tmp_path / "run", "read")
    changed(text)
    capsys.readouterr()
    train(config, tmp_path / "run")
    read = data_of(config)
    assert json.loads((tmp_path / "run/env.json").read_text())["data"] == read.summary()
    one, two = read.train.counts, read.validation.counts
    assert one.bytes + two.bytes == len(text.read_bytes())
    assert [line for line in capsys.readouterr().err.splitlines() if "training text: " in line] == [
        f"train: training text: {one.documents} documents, {one.bytes + one.documents:,} tokens, {one.bytes:,} bytes; "
        f"validation text: {two.documents} documents, {two.bytes + two.documents:,} tokens, {two.bytes:,} bytes, "
        "of which 1 x 4 x 16 tokens are read"
    ]


def test_a_comparison_does_not_mix_texts(tmp_path):
    config = tiny(text := write_text(tmp_path / "text.txt"), "residual")
    runs = plan(to_mapping(config), seeds(2))
    train(config, tmp_path / "runs/seed0")
    changed(text)
    with pytest.raises(InputError, match=r"The training text is not the one that .*seed0 was trained with"):
        prepare(tmp_path / "runs", Grid("two texts", runs), runs)
    assert not (tmp_path / "runs/sweep.json").exists()


def test_what_is_not_known_of_a_text_is_not_compared(tmp_path):
    check_text({}, {"train_sha256": "a", "validation_sha256": "b"}, tmp_path)
    with pytest.raises(InputError, match="The validation text is not"):
        check_text({"validation_sha256": "c"}, {"train_sha256": "a", "validation_sha256": "b"}, tmp_path)
