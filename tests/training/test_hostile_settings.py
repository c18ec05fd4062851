"""Settings, paths and addresses that no run can have end in a sentence with status 2, and nothing is written."""

import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.in_process import run_here
from support.tiny_runs import ROOT, data_of, tiny, write_text

from mhc_jax import cli, generation
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.data import ByteTokenizer
from mhc_jax.errors import InputError, shown
from mhc_jax.loop import train
from mhc_jax.parallel import distributed
from mhc_jax.runs import trained

DEMO = f"--config={ROOT}/experiments/configs/demo.py:mhc"
HUGE = "1" + "0" * 400
LONG = "x" * 300
REFUSED = {
    f"--config.model.width={HUGE}": r"model.width is 10+\.\.\.; it must be at most 2147483647",
    f"--config.optimizer.learning_rate={HUGE}": "optimizer.learning_rate is inf; it must be",
    "--config.optimizer.eps=nan": "optimizer.eps is nan; it must",
    "--config.train.steps=" + "9" * 5000: "train.steps",
    "--config.train.log_every=9223372036854775808": "train.log_every is 9223372036854775808; it must be at most",
    "--config.model.vocab_size=3000000000": "model.vocab_size is 3000000000; it must be at most 2147483647",
    "--config.model.connection.num_streams=4000": "num_streams is 4000; .* at most 256",
    "--config.model.connection.t_max=100000000": "at most 1000 are allowed",
    "--config.model.connection.disable=[res]": r"An entry of connection.disable is '\[res\]'; .* Did you mean 'res'",
    "--config.model.experts=9999999999999999": "it must begin with the number of experts",
    "--coordinator_address=host:99999": "'host:99999'; it must be HOST:PORT of process 0, with a port from 1 to 65535",
    "--coordinator_address=host:" + "9" * 5000: "with a port from 1 to 65535",
    f"--workdir={LONG}": "has 300 bytes",
    "--workdir=~nosuchuser/run": "The home folder '~nosuchuser'",
    "--workdir=a\udcff": "is not UTF-8 in this locale, and checkpoints cannot be written there",
}


@pytest.mark.parametrize("flag", REFUSED, ids=lambda flag: flag[:60].encode("ascii", "replace").decode())
def test_a_setting_that_cannot_be_is_one_line_and_writes_nothing(tmp_path, flag):
    together = ["--num_processes=2", "--process_id=1"] * flag.startswith("--coordinator")
    status, _, err = run_here("train", DEMO, f"--workdir={tmp_path}/run", *together, flag)
    assert (status, err.count("\n")) == (2, 1), err
    assert re.search(REFUSED[flag], err), err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train", "compare", "sweep", "report", "record", "generate", "evaluate", "convert"])
def test_a_name_that_is_too_long_is_told_by_every_script(tmp_path, script):
    arguments = {
        "train": [f"--config={LONG}.py", f"--workdir={tmp_path}/run"],
        "compare": [f"--config={LONG}.py", f"--workdir={tmp_path}/run"],
        "sweep": [f"{LONG}.py", f"--workdir={tmp_path}/run"],
        "record": [LONG, "name"],
        "generate": [f"--checkpoint={LONG}", "--prompt=x"],
        "evaluate": [f"--checkpoint={LONG}", "--tasks=piqa"],
        "convert": [LONG, str(tmp_path / "out")],
    }
    status, _, err = run_here(script, *arguments.get(script, [LONG]))
    assert (status, err.count("\n")) == (2, 1), err
    assert "too long" in err or "between two slashes" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"model": {"vocab_size": 2**31 - 1}},
            r"The parameters and the state of the optimizer would have [\d,]+ GB, and the",
        ),
        ({"model": {"width": 2**31 - 2, "head_width": 8}}, "too large to count in int32|would have"),
        ({"model": {"num_layers": 10**8}}, "would have"),
        ({"data": {"batch_size": 2**31 - 1}}, r"A batch would have [\d,]+ GB, and the memory has"),
    ],
)
def test_a_run_larger_than_the_memory_is_refused_before_its_folder_is_made(tmp_path, monkeypatch, settings, sentence):
    memory = {"SC_PHYS_PAGES": 2**22, "SC_PAGE_SIZE": 2**12}  # 16 GiB on every machine
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    config = tiny(write_text(tmp_path / "text.txt"))
    with pytest.raises(InputError, match=sentence):
        train(config.with_settings(**settings), tmp_path / "run", data=data_of(config))
    assert not (tmp_path / "run").exists()


def test_a_strict_ascii_terminal_shows_any_text(monkeypatch):
    """As with LC_ALL=C and PYTHONIOENCODING=ascii:strict."""
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii", "strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(
        cli.app, "run", lambda *_, **__: print("é\udcff", file=sys.stderr, flush=True) or print("🙂", flush=True)
    )
    cli.main(lambda: 0)
    assert [stream.buffer.getvalue() for stream in streams] == [b"\\U0001f642\n", b"\\xe9\\udcff\n"]


# -- prompts


class Echo:
    """In the place of `Generator`: the answer to a prompt is its last token."""

    def __init__(self, *_):
        pass

    def generate(self, prompts, _max_new, _sampling, show):
        if len(prompts[0]) > 9:
            raise InputError(f"The prompt has {len(prompts[0])} tokens and the context 9.")
        show(0, [prompts[0][-1]])
        return [[prompts[0][-1]]]


@pytest.fixture
def echo(monkeypatch, tmp_path):
    config = tiny(tmp_path / "none.txt")
    model = SimpleNamespace(tokenizer=ByteTokenizer(), config=config, folder=tmp_path, params={}, mesh=None)
    monkeypatch.setattr(trained, "load_trained", lambda *_: model)
    monkeypatch.setattr(generation, "Generator", Echo)

    def told(content: bytes) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        return run_here("generate", f"--checkpoint={tmp_path}")

    return told


def test_prompts_on_standard_input_may_have_empty_lines_and_any_line_end(echo):
    status, out, err = echo("ab\n\ncd\r\n\r\né".encode())
    assert (status, out, err.count("tokens in")) == (0, "abbcddé", 3)  # half of the é is not shown


def test_a_prompt_that_is_too_long_is_told_and_the_next_one_follows(echo):
    status, out, err = echo(b"a long one\nab\n")
    assert (status, out) == (2, "a long oneabb")
    assert "\nerror: The prompt has 10 tokens and the context 9.\n" in err


def test_a_prompt_that_is_not_utf8_is_told_with_its_line(echo):
    status, out, err = echo(b"ab\n\xff\n")
    assert (status, out) == (2, "abb")
    assert err.splitlines()[-1] == "error: Byte 0 of line 2 of standard input is not UTF-8; give prompts in UTF-8."


# -- any value of any setting


def leaves(mapping, prefix=()):
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


DEFAULTS = to_mapping(ExperimentConfig())
LEAVES = [*leaves(DEFAULTS)]
FLOATS = st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-400, 1e308, 5e-324, -1.0, 0.5])
INTS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**32, 2**63, -(2**63), 10**400, True])
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["nan", "a" * 400, "mla:kv_rank=" + "9" * 30, "auto:nan", "auto:1e400", "auto:inf"]
)
TEXTS |= st.sampled_from(
    ["document:-1", "document:" + "9" * 5000, "64:active=0", "²", "٣", "interleaved:0", "interleaved:" + "9" * 30]
)
TEXTS |= st.sampled_from(
    ["wandb:tags=", "muon:rms=nan", "muon:momentum=-0", "~", "a\0b", "\ud800", "my.py:f", "connection:" + "9" * 30]
)
OTHERS = st.sampled_from(
    [None, [], ["a"], [1], {}, {"kind": "mhc"}, {"kind": 5}, {"kind": []}, b"x", object(), [[]], [None], 1j]
)


def refused_in_a_sentence(function):
    """Call a function.  It may raise `InputError` of one line that is not too long, and nothing else."""
    try:
        return function()
    except InputError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 1000
        text.encode(errors="surrogatepass")
        return None


@settings(max_examples=600)
@given(st.sampled_from(LEAVES), FLOATS | INTS | TEXTS | OTHERS)
@example(("optimizer", "learning_rate"), 10**400)
@example(("model", "width"), 10**5000)
@example(("model", "experts"), 10**5000)
@example(("model", "attention_scope"), "document:" + "9" * 5000)
@example(("data", "tokenizer"), "a tokenizer " * 400)
@example(("model", "connection", "disable"), "pre")
@example(("model", "connection"), 5)
@example(("model", "connection", "kind"), [])
@example(("model",), None)
def test_any_value_of_any_setting_is_taken_or_refused_in_a_sentence(path, value):
    mapping = to_mapping(ExperimentConfig())
    section = mapping
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    config = refused_in_a_sentence(lambda: from_mapping(mapping))
    if config is not None:
        assert from_mapping(to_mapping(config)) == config or value != value


@settings(max_examples=200)
@given(
    st.recursive(
        FLOATS | INTS | TEXTS | OTHERS,
        lambda inner: st.dictionaries(TEXTS | st.sampled_from(["model", "data", "connection", "kind"]), inner),
    )
)
def test_any_mapping_is_a_configuration_or_refused_in_a_sentence(mapping):
    refused_in_a_sentence(lambda: from_mapping({"model": mapping}))
    if isinstance(mapping, dict):
        refused_in_a_sentence(lambda: from_mapping(mapping))


@settings(max_examples=200)
@given(st.text(max_size=12) | st.sampled_from(["host:1", "host:0", "[::1]:80", ":1", "h:٣", "h:65536"]), INTS, INTS)
def test_any_address_is_taken_or_refused_in_a_sentence(address, processes, process):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_join", lambda *_: None)
        refused_in_a_sentence(lambda: distributed.start(address, processes, process))


def test_values_in_sentences_are_short():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert [shown(value) for value in (1, "a\nb", Broken())] == ["1", r"'a\nb'", "a very large Broken"]
    assert len(shown("x" * 1000)) < 100
