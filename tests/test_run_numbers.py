"""Numbers that a run prints and writes, each against a value found another way: by hand, or in float64 from the text itself."""

import json
import math
import random

import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import Killed, Poisoned, kill_at, poisoned
from tiny_runs import data_of, lines, tiny, with_train, write_text

from mhc_jax import cost, loop, progress
from mhc_jax.checkpoint import check_text, load_params
from mhc_jax.data import train_bpe
from mhc_jax.errors import InputError
from mhc_jax.loop import train
from mhc_jax.mapping import from_mapping
from mhc_jax.model import Decoder
from mhc_jax.paired import run_all

HAN = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A run on a mix of scripts under BPE: (configuration, held-out documents); a part of the held-out text is validated."""
    folder = tmp_path_factory.mktemp("scripts")
    draw = random.Random(1)
    chinese = ["".join(draw.choice(HAN) for _ in range(150)) for _ in range(20)]
    english = [" ".join(draw.choice(("stream", "gate", "norm", "loss")) for _ in range(80)) for _ in range(20)]
    train_bpe([*english, *chinese[:3]], 320, folder / "bpe.json")
    held_out = [english[0], chinese[0], english[1], *chinese[1:9]]
    for name, texts in (("train", [*english[2:], *chinese[9:]]), ("held-out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = {"validation_source": str(folder / "held-out.jsonl"), "tokenizer": f"bpe:{folder / 'bpe.json'}"}
    config = tiny(folder / "train.jsonl", "residual", data=data, train={"steps": 2, "validation_batches": 10})
    return config, held_out


def test_bits_per_byte_are_those_of_the_tokens_that_are_validated(scripts, tmp_path):
    config, held_out = scripts
    summary = train(config, tmp_path / "run")
    tokenizer = data_of(config).tokenizer
    ids = [id for text in held_out for id in (*tokenizer.encode(text).tolist(), tokenizer.end_of_document)]
    windows = [ids[16 * i : 16 * i + 17] for i in range(40)]
    read = tokenizer.decode(id for window in windows for id in window[1:])
    assert "\ufffd" not in read, "the last window ends between two characters"
    assert read.startswith(held_out[0][1:]) or held_out[0][len(held_out[0]) - 50 :] in read
    assert held_out[1] in read

    saved, params = load_params(tmp_path / "run")
    model = Decoder(from_mapping(saved).model)
    logits, _ = model.apply({"params": params}, jnp.array([window[:-1] for window in windows]))
    logits = np.asarray(logits, np.float64)
    nats = 0.0
    for rows, window in zip(logits, windows, strict=True):
        for row, target in zip(rows, window[1:], strict=True):
            nats += math.log(sum(math.exp(x - row.max()) for x in row)) + row.max() - row[target]
    wanted = nats / math.log(2) / len(read.encode())

    last = lines(tmp_path / "run", "validation")[-1]
    assert summary["validation_loss"] == pytest.approx(nats / 640, rel=1e-6)
    assert summary["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert (last["loss"], last["bits_per_byte"]) == (summary["validation_loss"], summary["bits_per_byte"])


def test_the_train_lines_and_the_summary(text, tmp_path):
    """log_every=3: what is a mean or a median over steps is so over all of them."""
    times, losses, grads = [], [], []
    read = loop._Run._read

    def reading(self, step, metrics):
        before = self.clock["train_s"]
        out = read(self, step, metrics)
        times.append(self.clock["train_s"] - before)
        losses.append(float(metrics["loss"]))
        grads.append(float(metrics["grad_norm"]))
        return out

    clip = {"warmup_steps": 4, "grad_clip": 0.7, "schedule": "wsd"}
    config = tiny(text, "residual", optimizer=clip, train={"steps": 13, "log_every": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_read", reading)
        summary = train(config, tmp_path / "run")
    logged = lines(tmp_path / "run", "train")
    steps = [3, 6, 9, 12, 13]
    assert [line["step"] for line in logged] == steps
    assert [line["tokens"] for line in logged] == [4 * 16 * step for step in steps]
    assert [line["loss"] for line in logged] == pytest.approx([losses[step - 1] for step in steps], rel=1e-8)
    assert [line["clipped"] for line in logged] == [int(grads[step - 1] > 0.7) for step in steps]
    peak = config.optimizer.learning_rate
    assert [line["learning_rate"] for line in logged] == pytest.approx(
        [0.75 * peak, peak, peak, 0.55 * peak, 0.1 * peak]
    )
    raw = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in (line for line in raw if line["kind"] == "train"):
        assert line["step_time_s"] == pytest.approx(times[line["step"] - 1], rel=1e-5)
        assert line["tokens_per_s"] == pytest.approx(64 / times[line["step"] - 1], rel=1e-5)
    assert len(losses) == 13
    assert summary["train_loss"] == pytest.approx(sum(losses[3:]) / 10, rel=1e-8)
    assert summary["step_time_s"] == pytest.approx(sorted(times)[6], rel=1e-5)
    parts = [f"{name}_s" for name in ("compile", "train", "validation", "diagnostics", "checkpoint")]
    assert summary["wall_clock_s"] == pytest.approx(sum(summary[name] for name in parts), rel=1e-6)
    assert summary["train_s"] == pytest.approx(sum(times), rel=1e-5)
    # Embedding and head of 264 tokens, three norms, attention of 2 query and 1 key-value heads of 8, gated MLP of 16.
    assert summary["parameters"] == 2 * 264 * 16 + 3 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 16
    assert summary["connection_parameters"] == 0
    # Products of 2 operations a weight and token, three times (forward, and two backward), and attention's two over 16 tokens.
    products = 264 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 16
    hand = 3 * (2 * products + 2 * 2 * 16 * 16)
    assert hand < summary["flops_per_token"] < 1.25 * hand, "norms, softmax and Adam come on top"


def test_the_median_is_over_the_last_200_steps_however_often_the_run_was_stopped(text, tmp_path):
    run = object.__new__(loop._Run)
    run.step_times, run.losses = [9.0] * 100 + [1.0] * 98, []
    run.config, run.clock, run._mark = tiny(text, "residual"), {"train_s": 0.0}, 0.0
    run.tokens_per_step, run.spikes, run.progress = 64, loop.SpikeDetector(4, 0.5), loop.NoProgress()
    for step, now in enumerate((2.0, 4.0, 6.0, 8.0), 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.time, "perf_counter", lambda now=now: now)
            patch.setattr(run, "writer", loop.NoWriter(), raising=False)
            run._read(step, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
    assert run.step_times == [9.0] * 98 + [1.0] * 98 + [2.0] * 4


def test_the_learning_rate_of_a_step_that_diverges_is_its_own(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "first", 2)
    monkeypatch.setattr(Poisoned, "last", 99)
    config = tiny(text, "residual", optimizer={"warmup_steps": 4, "learning_rate": 0.008})
    assert train(config, tmp_path / "run", data=poisoned(config))["status"] == "diverged"
    rates = [line["learning_rate"] for line in lines(tmp_path / "run", "train")]
    assert rates == pytest.approx([0.002, 0.004], rel=1e-6)


def test_the_peak_is_this_run_s_and_not_that_of_one_before_it(text, tmp_path, monkeypatch):
    """Against a stand-in for a GPU's counter, which keeps the peak of the whole process."""
    config = tiny(text, "residual", train={"steps": 2})
    compiled = train(config, tmp_path / "cpu")["peak_memory_bytes"]
    for name, counts, wanted in (("first", [100, 5000], 5000), ("smaller", [5000, 5000], compiled)):
        with monkeypatch.context() as patch:
            patch.setattr(cost, "device_peak", lambda counts=iter(counts): next(counts))
            assert train(config, tmp_path / name)["peak_memory_bytes"] == wanted


def test_the_time_left_counts_from_the_first_step(monkeypatch, capsys):
    """Half a minute of compilation, then a step every two seconds."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.RunProgress("run", total=20, start=10, every_s=0.0)
    for step, now in ((11, 30.0), (12, 32.0), (15, 38.0), (20, 48.0)):
        clock[0] = now
        shown.update(step, 1.0, 64.0)
    assert [line.partition("tokens/s")[2].strip() for line in capsys.readouterr().err.splitlines()] == [
        "", "16 s left", "10 s left", "0 s left"
    ]  # fmt: skip
    clock[0] = 0.0
    items = progress.ItemProgress("eval", "items", 10, every_s=0.0)
    for now, count in ((30.0, 4), (34.0, 2)):
        clock[0] = now
        items.advance(count)
    assert [line.partition("/10")[2].strip() for line in capsys.readouterr().err.splitlines()] == ["", "8 s left"]


def changed(text):
    text.write_text(text.read_text().replace("stream", "DREAMS"))


def test_a_run_does_not_go_on_with_another_text(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt")
    config = tiny(text, "residual")
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_read", lambda self, step, metrics: step == 5)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    before, files = text.read_text(), {p.name for p in (tmp_path / "run").rglob("*")}
    changed(text)
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_compile", lambda *args: True)
        with pytest.raises(InputError, match=r"The training text is not the one that .*run was trained with \(SHA-256"):
            train(config, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").rglob("*")} == files
    text.write_text(before)  # the same text in a file of another time
    assert train(config, tmp_path / "run")["status"] == "finished"


def test_a_run_that_starts_anew_records_the_text_that_it_reads(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.txt")
    config = tiny(text, "residual", train={"steps": 2})
    with monkeypatch.context() as patch:
        kill_at(patch, loop._Run, "_read", lambda self, step, metrics: True)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    changed(text)
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/env.json").read_text())["data"] == data_of(config).summary()


def test_a_comparison_does_not_mix_texts(tmp_path):
    text = write_text(tmp_path / "text.txt")
    config = tiny(text, "residual", train={"steps": 2})
    runs = {"residual": config, "other": with_train(config, seed=1)}
    train(config, tmp_path / "runs/residual")
    changed(text)
    with pytest.raises(InputError, match=r"The training text is not the one that .*residual was trained with"):
        run_all(runs, tmp_path / "runs", "two texts")
    assert not (tmp_path / "runs/other").exists()


def test_what_is_not_known_of_a_text_is_not_compared(tmp_path):
    check_text({}, {"train_sha256": "a", "validation_sha256": "b"}, tmp_path)
    with pytest.raises(InputError, match="The validation text is not"):
        check_text({"validation_sha256": "c"}, {"train_sha256": "a", "validation_sha256": "b"}, tmp_path)


def test_the_sizes_of_both_splits_are_said_at_the_start(text, tmp_path, capsys):
    config = tiny(text, "residual", train={"steps": 2})
    train(config, tmp_path / "run")
    counts = data_of(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "training text: " in line]
    size = len(text.read_bytes())
    assert counts.train.counts.bytes + counts.validation.counts.bytes == size
    documents = [c.counts.documents for c in (counts.train, counts.validation)]
    held_out = counts.validation.counts.bytes
    assert told == [
        f"train: training text: {documents[0]} documents, {size - held_out + documents[0]:,} tokens, {size - held_out:,} "
        f"bytes; validation text: {documents[1]} documents, {held_out + documents[1]:,} tokens, {held_out:,} bytes, of which "
        f"1 x 4 x 16 tokens are read"
    ]
