"""Files and names that no good tool makes: each is read, or refused in a sentence with file and line, within bounded memory."""

import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_data_sources import RECORDS, encoded

from mhc_jax import data
from mhc_jax.data import arrays, files, sources
from mhc_jax.data.files import expand, read_files, text_blocks
from mhc_jax.errors import InputError, user_path

FINE = b'{"text": "fine"}\n'


def texts_of(path: Path) -> list[str]:
    return [document.text for document in read_files([path])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "a number in it has too many digits"),
        (b'{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it nests too deeply"),
        (b"[" * 1_000_000, "it nests too deeply"),
        (b'{"text": "x"}\0', "Extra data at column 14"),
    ],
)
def test_json_that_python_cannot_read_is_told_with_its_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(FINE + line + b"\n" + FINE)
    with pytest.raises(InputError, match=re.escape(f"{path}, line 2: not valid JSON ({reason}); each line must be")):
        texts_of(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_name_that_is_not_utf8_is_read(tmp_path, suffix):
    content = "\n".join(r["text"] for r in RECORDS).encode() if suffix == ".txt" else encoded(suffix, RECORDS)
    with open(os.path.join(os.fsencode(tmp_path), b"a\xff" + suffix.encode()), "wb") as file:
        file.write(content)
    name = f"{tmp_path}/a\udcff{suffix}"
    assert "".join(texts_of(expand(name)[0])) == ("\n" if suffix == ".txt" else "").join(r["text"] for r in RECORDS)
    counts = arrays.token_array(name, "train", data.ByteTokenizer(), cache=tmp_path, fraction=0.0).counts
    assert counts.bytes > 1000
    (tmp_path / "b.jsonl").write_bytes(FINE)
    (tmp_path / "c\udcff.jsonl").write_bytes(b"[]\n")
    assert len(expand(str(tmp_path))) == 3
    with pytest.raises(InputError, match="line 1: a JSON list"):
        texts_of(tmp_path / "c\udcff.jsonl")


LONG = "x" * 300
PATHS = {
    "~nosuchuser/a": "The home folder '~nosuchuser' in .* is not known: there is no such user; give the whole path",
    f"{LONG}/a": ".*has .* bytes, and 300 between two slashes; at most 4095 and 255 are possible",
    "y" * 200 + ("/" + "y" * 200) * 30: ".*has 6... bytes",
    "a\0b": ".*has a NUL character",
    "a\ud800b": "Character 1 of the path .* cannot be in a path",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_cannot_be_is_refused_wherever_it_is_given(tmp_path, monkeypatch, path):
    sentence = PATHS[path]
    for source in (f"{path}.txt", f"{path}.py:documents"):
        with pytest.raises(InputError, match=sentence):
            list(sources.documents(source, "train", cache=tmp_path))
        with pytest.raises(InputError, match=sentence):
            sources.identity(source)
    for spec in ("bpe", "hf", "gpt2"):
        with pytest.raises(InputError, match=sentence):
            data.load_tokenizer(f"{spec}:{path}")
    with pytest.raises(InputError, match=sentence):
        data.train_bpe(["text"], 257, path)
    if "\0" not in path and "\ud800" not in path:  # an environment variable cannot hold them
        monkeypatch.setenv("MHC_JAX_CACHE", path)
        with pytest.raises(InputError, match=f"The cache folder: {sentence}"):
            data.cache_folder()


def test_a_home_folder_that_nobody_knows(monkeypatch):
    """As in a container whose user is a number without an entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert user_path("a/b.txt") == Path("a/b.txt")
    with pytest.raises(InputError, match=r"'~' in '~/a' is not known: \$HOME is not set, and this user has no entry"):
        user_path("~/a")
    monkeypatch.delenv("MHC_JAX_CACHE", raising=False)
    with pytest.raises(InputError, match=r"\$HOME is not set.*\$MHC_JAX_CACHE names this folder"):
        data.cache_folder()


# -- long lines and other line ends


def blocks_by_lines(text: str) -> list[str]:
    """Return the blocks of a text whose lines are short, by the rule that earlier versions had for every text."""
    out, start = [], 0
    while start < len(text):
        blank = re.compile(r"\n[ \t\r]*\n").search(text, start + files.BLOCK, start + 2 * files.BLOCK)
        cut = blank or re.compile(r"\n").search(text, start + 2 * files.BLOCK)
        end = cut.end() if cut else len(text)
        out.append(text[start:end])
        start = end
    return out


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["a", "b ", "\n", "\n\n", "\r\n", "\r", " ", "\n \t\r\n", "word " * 4]), max_size=80),
    st.data(),
)
def test_blocks_of_any_text_join_to_it_stay_short_and_do_not_depend_on_how_it_is_read(parts, more):
    text = "".join(parts)
    cuts = sorted(more.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", 4)
        patch.setattr(files, "LONGEST_BLOCK", 64)
        blocks, before = list(text_blocks(pieces)), blocks_by_lines(text)
    assert "".join(blocks) == text
    assert all(0 < len(block) <= 64 for block in blocks)
    if "\n" in text[:64] and all(len(block) <= 64 for block in before):
        assert blocks == before


def test_one_long_line_is_cut_at_spaces_and_without_them_anywhere(tmp_path):
    line = "".join(f"word{i} " for i in range(60_000))
    for name, text in (("text8", line), ("no_space", "x" * 500_000)):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        blocks = texts_of(path)
        assert "".join(blocks) == text
        assert max(map(len, blocks)) <= files.LONGEST_BLOCK
        assert len(blocks) >= 4
        assert name == "no_space" or all(block.endswith(" ") for block in blocks)
    halves = [list(sources.documents(str(tmp_path / "text8.txt"), s, cache=tmp_path)) for s in ("train", "validation")]
    assert min(map(len, halves)) > 0


def test_cr_alone_ends_lines(tmp_path):
    """In .txt files they are cut as files with LF are; in .jsonl files each record is a line."""
    text = "".join(f"line {i} has some words\n{'' if i % 100 else chr(10)}" for i in range(5000))
    for name, end in (("lf", "\n"), ("cr", "\r")):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", end).encode())
    assert [block.replace("\r", "\n") for block in texts_of(tmp_path / "cr.txt")] == texts_of(tmp_path / "lf.txt")
    assert len(texts_of(tmp_path / "cr.txt")) > 5
    records = tmp_path / "cr.jsonl"
    records.write_bytes(b"".join(json.dumps({"text": f"{i}\r\n"}).encode() + b"\r" for i in range(3)))
    assert texts_of(records) == ["0\r\n", "1\r\n", "2\r\n"]
    records.write_bytes(b'{"text":\r"x"}\r\n{"text": "y"}\r{}')
    with pytest.raises(InputError, match="line 3: there is no 'text'"):
        texts_of(records)


def test_a_byte_that_is_not_utf8_is_named_wherever_pieces_end(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for start in ("", "\ufeff"):
        for fill in range(5):
            content = f"{start}é\n{'é' * fill}\nü".encode() + b"\xff" + b"more"
            path.write_bytes(content)
            monkeypatch.setattr(files, "_READ", 3)
            with pytest.raises(InputError, match=f"a.txt, line 3: byte {content.index(255)} is not UTF-8"):
                texts_of(path)


# -- small files that expand


def memory_of(function) -> int:
    """Return the largest number of bytes that Python held at once while `function` ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_that_expands_is_refused_within_bounded_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "LARGEST_RECORD", 1 << 20)
    line = b'{"text": "' + b"a" * (64 << 20) + b'"}\n'
    packed = gzip.compress(line, 1) if suffix == ".gz" else pa.Codec("zstd").compress(line, asbytes=True)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    del line

    def refused():
        with pytest.raises(InputError, match=r"a.jsonl\S+, line 1: it has more than 1,048,576 bytes, the most that"):
            texts_of(path)

    assert memory_of(refused) < 16 << 20


def test_parquet_metadata_that_would_end_the_process_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"]}), path)
    content = path.read_bytes()
    assert content.count(b"%\x02\x18\x04text") == 1  # the column is optional, so that its statistics have levels
    path.write_bytes(content.replace(b"%\x02\x18\x04text", b"%\x03\x18\x04text"))
    for largest in (files.LARGEST_RECORD, 1):  # the columns are looked at in a process of its own with the second
        monkeypatch.setattr(files, "LARGEST_RECORD", largest)
        with pytest.raises(InputError, match=r"a\.parquet .*: Definition level histogram size mismatch"):
            texts_of(path)
    assert content.count(b"\x19\x18\x04text") == 1  # the path of the column, in its metadata
    path.write_bytes(content.replace(b"\x19\x18\x04text", b"\x19\x18\x04\xffext"))
    with pytest.raises(InputError, match=r"a\.parquet is not .*file: 'utf-8' codec can't decode byte 0xff"):
        texts_of(path)


@pytest.mark.parametrize("fault", ["import os; os.kill(os.getpid(), 9)", "import no_such_module"])
def test_what_befalls_the_process_of_the_columns_is_not_blamed_on_the_file(tmp_path, monkeypatch, fault):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a"]}), path)
    monkeypatch.setattr(files, "LARGEST_RECORD", 1)
    monkeypatch.setattr(files, "_COLUMN_SIZES", fault)
    with pytest.raises(RuntimeError, match=r"(?s)could not be read \(status (-9|1\).*no_such_module)"):
        texts_of(path)


POOLS = []
"""Pools of `new_pool`.  They live as long as the process, because Arrow may free what it has of one after the test."""


@pytest.fixture
def new_pool():
    """Return a function that makes a new memory pool that Arrow uses from then on, so that its peak is of what follows alone."""
    before = pa.default_memory_pool()

    def new():
        POOLS.append(pa.proxy_memory_pool(before))
        pa.set_memory_pool(POOLS[-1])
        return POOLS[-1]

    yield new
    pa.set_memory_pool(before)


LONG, OTHER = pa.array(["a" * (64 << 20)]), pa.array([os.urandom(1 << 18)])


@pytest.mark.parametrize("column", [LONG, LONG.cast("binary"), pa.ListArray.from_arrays([0, 1], LONG)])
def test_a_parquet_column_that_expands_is_refused_within_bounded_memory(tmp_path, monkeypatch, new_pool, column):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(files, "LARGEST_RECORD", 1 << 21)
    parquet.write_table(pa.table({"text": column, "other": OTHER}), path, compression="zstd")
    pool = new_pool()
    with pytest.raises(InputError, match=r"a.parquet: the column 'text\S*' has [\d,]+ bytes that expand to 67,108,\d+"):
        texts_of(path)
    assert pool.max_memory() < 1 << 20


def test_a_parquet_column_that_is_not_read_may_expand(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_RECORD", 1 << 21)
    (tmp_path / "json.py").write_text("raise SystemExit(1)")  # the reader's own process must not import this
    monkeypatch.chdir(tmp_path)
    for name in ("other", "text.x"):
        parquet.write_table(pa.table({"text": ["a"], name: LONG}), "a.parquet", compression="zstd")
        assert texts_of(Path("a.parquet")) == ["a"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    struct = pa.StructArray.from_arrays([LONG], ["x"])
    for columns in ([pa.array(["a"]), struct], [struct, pa.array(["a"])]):
        parquet.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "a.parquet", compression="zstd")
        with pytest.raises(InputError, match=r"a.parquet has more than one column 'text'; rename"):
            texts_of(tmp_path / "a.parquet")


def test_rows_of_parquet_are_read_a_few_at_a_time(tmp_path, monkeypatch, new_pool):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(files, "LARGEST_RECORD", 1 << 21)
    # A dictionary stores one value for many rows.
    parquet.write_table(pa.table({"text": [os.urandom(1 << 19).hex()] * 256}), path, compression=None)
    assert path.stat().st_size < 2 << 20
    pool = new_pool()
    assert sum(1 for _ in read_files([path])) == 256
    assert pool.max_memory() < 64 << 20
    parquet.write_table(pa.table({"text": [os.urandom(1 << 21).hex()]}), path, compression=None)
    with pytest.raises(InputError, match=r"a.parquet, row 1: it has more than 2,097,152 bytes"):
        texts_of(path)
