"""Folders, functions of users as sources, and the page about them: its examples run, in this process and in others."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import types

import pytest
from support.ends import at_read_of, train_until_killed
from support.shared_programs import shared_programs  # noqa: F401
from support.tiny_runs import ROOT, tiny
from support.workers_here import workers_here

from mhc_jax import data, user_functions
from mhc_jax.config.mapping import to_mapping
from mhc_jax.data import files, sources
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.loop import train
from mhc_jax.runs.trained import load_trained
from mhc_jax.sweeps import runner
from mhc_jax.sweeps.grid import Grid, over, plan

PAGE = (ROOT / "docs" / "your_data.md").read_text()
EXAMPLES = {code.split()[1]: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^    (python .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder in which the page's commands are typed: the examples, a folder of texts with other files, and held-out texts."""
    monkeypatch.chdir(tmp_path)
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    for i in range(40):
        for folder in ("texts", "texts/deeper", "texts/.hidden", "held_out"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i:02}.txt").write_text(f"A text of {folder} with the number {i}. " * 20)
    for name in ("a.csv", "deeper/b.csv", "README", ".hidden.txt", "deeper/.gitignore"):
        (tmp_path / "texts" / name).write_text("not read")
    return tmp_path


def test_a_folder_is_its_text_files_at_any_depth(here, config):
    found = files.expand("texts")
    assert [str(file) for file in found] == sorted(f"texts/{d}{i:02}.txt" for d in ("", "deeper/") for i in range(40))
    loaded = data.load_data(config(source="texts"))
    assert loaded.train.counts.documents + loaded.validation.counts.documents == 80
    (line,) = [line for line in loaded.describe(1) if "skipped" in line]
    assert line == "texts: 3 files of other kinds are skipped: .csv, no suffix"
    (here / "texts/deeper/b.csv").unlink()
    (here / "texts/README").unlink()
    assert files.skipped("texts") == "1 file of another kind is skipped: .csv"
    before = loaded.identity
    (here / "texts/deeper/00.txt").write_text("Another text. " * 20)
    assert data.load_data(config(source="texts")).identity != before
    apart = data.load_data(config(source="texts", validation_source="held_out"))
    assert (apart.train.counts.documents, apart.validation.counts.documents) == (80, 40)
    with pytest.raises(InputError, match=r"texts/00.txt is in data.source and in data.validation_source"):
        data.load_data(config(source="texts", validation_source="texts/0*.txt"))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"The folder '.*' holds no text file \(it is empty\); give a file, folder or glob"
    ):
        files.expand(str(tmp_path))
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"holds no text file \(1 file of another kind is skipped: .pdf\)"):
        files.expand(str(tmp_path))


def rows(split):
    return [{"text": f"{split} {i}", "other": object()} for i in range(30)]


SPLITS = {
    "lambda split: [f'{split} {i}' for i in range(30)]": False,
    "lambda split: ({'text': f'{split} {i}', 'id': f'a {i}', 'label': 3} for i in range(30))": False,
    "lambda split: None if split == 'validation' else (f'{split} {i}' for i in range(30))": True,
}


@pytest.mark.parametrize(("function", "by_hash"), SPLITS.items(), ids=["texts", "records", "None"])
def test_splits_of_a_function(tmp_path, cache, function, by_hash):
    (tmp_path / "mine.py").write_text(f"documents = {function}\n")
    source = f"{tmp_path}/mine.py:documents"
    train, held_out = (list(sources.documents(source, s, cache=cache, fraction=0.2)) for s in ("train", "validation"))
    if by_hash:
        assert sorted(found.text for found in train + held_out) == sorted(f"train {i}" for i in range(30))
        assert 0 < len(held_out) < 15
    else:
        assert [found.text for found in train] == [f"train {i}" for i in range(30)]
        assert [found.text for found in held_out] == [f"validation {i}" for i in range(30)]
    assert [found.id for found in train][:1] == (["a 0"] if "'id'" in function else [f"{source}:train:1"])
    assert len(list(sources.documents(source, "train", cache=cache, fraction=0.0))) == 30


REFUSED = {
    "def other(split): ...": "The function in the source '{}' is 'documents'; it must be one of 'other'",
    "documents = 3": "The function in the source '{}' is 'documents'",
    "def documents(": "'{}' fails: SyntaxError: ",
    "x = 1\n1 / 0": "'{}' fails at line 2: ZeroDivisionError: division by zero",
    "def documents(): return []": "'{}' does not take one argument; write `def documents(split):`",
    "def documents(split):\n    raise OSError('no\\nnetwork')": "'{}' fails at line 2: OSError: no network",
    "def documents(split):\n    yield 'a'\n    yield {}['b']": "'{}' fails at line 3: KeyError: 'b'",
    "def documents(split): ...": "'{}' returns nothing (None) for the split 'train'",
    "def documents(split): return 'a text'": "returns a str for the split 'validation'; it must return an iterable of texts",
    "def documents(split): return {'train': []}": "returns a dict for the split",
    "def documents(split): return 3": "returns a int for the split",
    "def documents(split): return ['a', 3]": "{}, document 2 of the split 'train': a int; each item must be a text, or a record",
    "def documents(split): return [{'body': 'a'}]": "{}, document 1 of the split 'train': there is no 'text'",
    "def documents(split): return ['a\\ud83d']": "{}, document 1 of the split 'train': character 1 of 'text' is half of a",
    "def documents(split): return [' ']": "'{}' gives no text for the split 'train'; give some",
}


@pytest.mark.parametrize(("code", "sentence"), REFUSED.items(), ids=str)
def test_a_function_that_cannot_be_used_is_told_in_one_sentence(tmp_path, cache, code, sentence):
    (tmp_path / "mine.py").write_text(f"{code}\n")
    source = f"{tmp_path}/mine.py:documents"
    with pytest.raises(InputError, match=re.escape(sentence.format(source))) as caught:
        list(sources.documents(source, "train", cache=cache))
    assert "\n" not in str(caught.value)


def test_a_generator_without_items_is_not_none(tmp_path, cache):
    (tmp_path / "mine.py").write_text("def documents(split):\n    if split == 'train':\n        yield 'a'\n")
    with pytest.raises(InputError, match="for 'validation' return None, from a function without `yield`"):
        list(sources.documents(f"{tmp_path}/mine.py:documents", "validation", cache=cache))


def test_a_file_that_is_missing_or_names_no_function(tmp_path):
    with pytest.raises(InputError, match=r"There is no file '.*mine.py', which the source '.*mine.py:documents' names"):
        sources.identity(f"{tmp_path}/mine.py:documents")
    (tmp_path / "mine.py").touch()
    with pytest.raises(InputError, match=r"or name a function of it, as in '.*mine.py:documents'"):
        sources.identity(f"{tmp_path}/mine.py")


def test_the_key_of_the_cache_has_the_content_of_the_file(here, config, monkeypatch):
    settings = config(source="my_data.py:documents")
    before = user_functions.identity("the source", settings.source)
    first = data.load_data(settings).identity
    with monkeypatch.context() as patch:
        patch.setattr(sources.functions, "load", lambda source: pytest.fail("read again"))
        assert data.load_data(settings).identity == first
    (here / "my_data.py").write_text(
        EXAMPLES["my_data.py"].replace("VERSION = 1", "VERSION = 2").replace("Row", "Line")
    )
    after = user_functions.identity("the source", settings.source)
    assert (after[:2], after[2] == before[2]) == (before[:2], False)
    assert data.load_data(settings).identity != first


def test_every_command_of_the_page_finds_its_text(here, monkeypatch):
    stories = types.SimpleNamespace(load_dataset=lambda name, split, streaming: iter(rows(split) * streaming))
    monkeypatch.setitem(sys.modules, "datasets", stories)
    seen = set()
    for python, script, *flags in map(shlex.split, COMMANDS):
        assert python == "python"
        given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        if script.endswith("tokenizer.py"):
            runpy.run_path(str(ROOT / script))["main"](flags)
            continue
        assert script == "experiments/train.py"
        assert (ROOT / given.pop("config").partition(":")[0]).is_file()
        assert given.pop("workdir")
        changed = {"data": {"sequence_length": 16, "batch_size": 2}, "model": {}}
        for key, value in given.items():
            _, section, name = key.split(".")
            changed[section][name] = value
        run = tiny(here, "residual").with_settings(**changed)
        loaded = data.load_data(run.data)
        resolved = data.resolve_tokenizer(run, loaded).model
        seen.add((run.data.source, loaded.tokenizer.vocab_size, resolved.attention_scope))
        assert loaded.train.counts.documents >= 30
    assert seen == {
        ("texts", 264, "window"),
        ("texts", 264, "document:256"),
        ("my_data.py:documents", 264, "window"),
        ("my_data.py:documents", 280, "window"),
        ("stories.py:documents", 264, "window"),
    }


def test_packed_documents_of_a_function_train_go_on_and_are_loaded(here):
    """config.json keeps the setting as it was given, and the checkpoint the id of the tokenizer's token."""
    scope = {"model": {"attention_scope": "document"}}
    config = tiny("my_data.py:documents", "residual", **scope)
    train_until_killed(config, here / "run", "read", at_read_of(5))
    code = (here / "my_data.py").read_text()
    (here / "my_data.py").write_text(code.replace("Row", "Line"))
    with pytest.raises(InputError, match="The training text is not the one that"):
        train(config, here / "run")
    (here / "my_data.py").write_text(code.replace("VERSION = 1", "VERSION = 2"))
    assert train(config, here / "run")["status"] == "finished"
    assert read_json(here / "run" / "config.json")["model"]["attention_scope"] == "document"
    model = load_trained(here / "run")
    assert (model.config.model.attention_scope, model.config.model.document_token) == ("document:256", 256)
    with pytest.raises(
        InputError, match=r"'document:3', but the end-of-document token of the tokenizer is 256; use 'document'"
    ):
        train(tiny("my_data.py:documents", "residual", model={"attention_scope": "document:3"}), here / "other")
    assert not (here / "other").exists()


def test_workers_of_a_sweep_read_a_function(here):
    base = tiny("my_data.py:documents", "residual", train={"steps": 3, "checkpoint_every": 0})
    runs = plan(to_mapping(base), over("model.attention_scope", ["document"]))
    with workers_here():
        assert runner.run_local(here / "sweep", Grid("one scope", runs), runs, workers=1) == 0
    summary = read_json(here / "sweep" / runs[0].name / "summary.json")
    assert (summary["status"], summary["steps"]) == ("finished", 3)


def test_another_process_reads_the_same_text(here, config):
    settings = config(source="my_data.py:documents")
    code = (
        "from types import SimpleNamespace\n"
        "from mhc_jax import data\n"
        f"print(data.load_data(SimpleNamespace(**{vars(settings)!r})).identity)\n"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "MHC_JAX_CACHE": str(here / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ) | path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{data.load_data(settings).identity}\n"), done.stderr
