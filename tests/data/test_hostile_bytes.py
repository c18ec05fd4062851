"""Files of any bytes: text in every format, tokenizers and weights are read, or refused in a sentence, within bounded memory."""

import gzip
import json
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import save
from test_data_sources import RECORDS, encoded

from mhc_jax import data
from mhc_jax.data.files import read_files
from mhc_jax.data.tokenizers import BPETokenizer
from mhc_jax.errors import InputError
from mhc_jax.weights.tensor_files import FILE, INDEX, TensorFiles

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FILES = {suffix: encoded(suffix, RECORDS[:12]) for suffix in SUFFIXES}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**400, "\ud800", 2**63]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def told(function):
    """Call a function.  It may raise `InputError` with one line, and nothing else."""
    try:
        return function()
    except InputError as error:
        text = str(error)
    assert "\n" not in text.rstrip()
    assert len(text) < 1500
    return None


@st.composite
def damaged(draw, contents):
    """The content of a good file with a few bytes changed, cut out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        place, size = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 2, 8, 100]))
        content[place : place + size] = draw(st.binary(max_size=9) | st.just(bytes(content[:size])))
    return bytes(content)


def check_text(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    found = told(lambda: list(read_files([path])))
    assert found is None or all(document.text.strip() for document in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=100)
@given(st.data())
def test_a_damaged_text_file(tmp_path_factory, suffix, more):
    check_text(tmp_path_factory, suffix, more.draw(damaged([FILES[suffix]]) | st.binary(max_size=40)))


@pytest.mark.full
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=3000)
@given(st.data())
def test_many_damaged_text_files(tmp_path_factory, suffix, more):
    check_text(tmp_path_factory, suffix, more.draw(damaged([FILES[suffix]])))


@settings(max_examples=200)
@given(st.lists(JSON, max_size=4), st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
def test_json_lines_of_any_values(tmp_path_factory, values, end):
    content = "".join(json.dumps(value) + end for value in values).encode()
    check_text(tmp_path_factory, ".jsonl", content)
    check_text(tmp_path_factory, ".jsonl.gz", gzip.compress(content, 1))


COLUMNS = {
    "int": pa.array([1, 2]),
    "null": pa.nulls(2),
    "binary": pa.array([b"\xff", b"a"]),
    "large": pa.array(["x", None], pa.large_string()),
    "list": pa.array([["a"], []]),
    "struct": pa.array([{"text": "a"}, None]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "not utf8": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("3i", 0, 1, 2)), pa.py_buffer(b"\xffa")]
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parquet_column_of_any_type(tmp_path_factory, name):
    parquet.write_table(pa.table({"id": COLUMNS[name], "text": COLUMNS[name]}), out := pa.BufferOutputStream())
    check_text(tmp_path_factory, ".parquet", out.getvalue().to_pybytes())


# -- tokenizer files

WRONG = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
WRONG |= st.sampled_from(
    [[], {}, [[]], {"type": "Sequence"}, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "ByteLevel"}, 10**400]
)
WRONG |= st.sampled_from(
    [{"type": "Sequence", "normalizers": 5}, {"type": "Sequence", "pretokenizers": []}, "\ud800", [{"content": "x"}]]
)


def places(value, path=()):
    """Yield the paths to every entry of a JSON value, but few of those in long ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:12]:
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def content(bpe) -> dict:
    return json.loads(bpe.read_text())


def check_tokenizer(content: bytes):
    tokenizer = told(lambda: BPETokenizer(content, "file"))
    if tokenizer is not None:
        for text in ("", "a naïve  façade\n", "e\u0301", "zq 🙂"):
            ids = tokenizer.encode(text)
            assert tokenizer.token_bytes[ids].sum() - tokenizer.count_bytes(text) in (0, 1)
            assert tokenizer.decode(ids) == (text if not tokenizer.normalizes else tokenizer._normalized(text))


@settings(max_examples=150)
@given(st.data())
def test_a_tokenizer_file_with_a_wrong_entry(content, more):
    changed = json.loads(json.dumps(content))
    for _ in range(more.draw(st.integers(1, 2))):
        path = more.draw(st.sampled_from([*places(changed)][1:]))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = more.draw(WRONG)
    check_tokenizer(json.dumps(changed).encode())


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_tokenizer_file(content, more):
    check_tokenizer(more.draw(damaged([json.dumps(content).encode()]) | st.binary(max_size=40)))


@settings(max_examples=100)
@given(WRONG | st.dictionaries(st.just("eos_token"), WRONG | st.fixed_dictionaries({"content": WRONG})))
def test_a_hugging_face_folder_with_any_settings(content, tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    told(lambda: data.load_tokenizer(f"hf:{folder}"))


# -- weights

GOOD = save({"a/b": np.ones((2, 3), np.float32), "c": np.zeros(4, np.float16)}, {"step": "1"})


def header(entries, fill: int = 8) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * fill


def check_weights(tmp_path_factory, content: bytes):
    folder = tmp_path_factory.getbasetemp() / "weights"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(content)

    def read():
        files = TensorFiles(folder)
        return [told(lambda name=name, shape=shape: files.take(name, shape)) for name, shape in files.shapes.items()]

    told(read)


@settings(max_examples=200)
@given(damaged([GOOD]) | st.binary(max_size=40))
@example(struct.pack("<Q", 2**62) + b"{}")
@example(header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}))
@example(header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}))
@example(header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}))
@example(header({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}))
@example(header({"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}))
@example(header({"__metadata__": {"a": 5}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}))
@example(header([]))
def test_a_damaged_file_of_weights(tmp_path_factory, content):
    check_weights(tmp_path_factory, content)


@settings(max_examples=100)
@given(
    JSON
    | st.fixed_dictionaries(
        {"weight_map": JSON | st.dictionaries(st.text(max_size=3), st.sampled_from([FILE, "../x", "", "/", "a\0", 3]))}
    )
)
@example({"weight_map": {"a": "../../etc/passwd"}})
@example({"weight_map": {"a": "x" * 300}})
@example({"weight_map": {"a": "\ud800"}})
def test_an_index_of_any_content(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(GOOD)
    (folder / INDEX).write_text(json.dumps(content))
    told(lambda: TensorFiles(folder))
