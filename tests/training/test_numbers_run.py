"""The numbers of a run agree with its files, float64 loops and counts by hand: a tiny run with experts on two devices."""

import dataclasses
import json
import math
import platform
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from support import numbers_page
from support.ends import Poisoned, poisoned
from support.tiny_runs import final_state, tiny
from support.tiny_runs import lines as read_lines

from mhc_jax import loop, runs, train_step
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.config import MeshConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.cost import counts
from mhc_jax.cost.counts import model_cost
from mhc_jax.data import load_data, resolve_tokenizer, train_bpe
from mhc_jax.loop import train
from mhc_jax.model import Decoder, cross_entropy
from mhc_jax.runs.checkpoint import load_params
from mhc_jax.runs.environment import used_devices
from mhc_jax.runs.history import History
from mhc_jax.runs.programs import abstract_state
from mhc_jax.sweeps.results import measurements
from mhc_jax.train_step import init_state

EXPERTS = {"num_layers": 2, "experts": "4:active=2:width=8:buffer=1"}


@pytest.fixture(scope="module")
def config(text):
    train = {"steps": 12, "diagnostics_every": 3, "validate_every": 6, "checkpoint_every": 0}
    model, optimizer = EXPERTS, {"grad_clip": 2.0, "warmup_steps": 4}
    config = tiny(text, "mhc:init=home:t_max=2", model=model, optimizer=optimizer, train=train)
    return dataclasses.replace(config, mesh=MeshConfig(data=2))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The folder and the summary of a run, and its lines by kind."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config, folder)
    lines = {kind: read_lines(folder, kind, times=True) for kind in ("train", "validation", "diagnostics")}
    return types.SimpleNamespace(folder=folder, summary=json.loads((folder / "summary.json").read_text()), **lines)


def test_numbers_of_the_summary(run):
    summary, last = run.summary, run.diagnostics[-1]
    for side in ("forward", "backward"):
        profiles = [line[f"composite_{side}"] for line in run.diagnostics]
        assert summary[f"max_composite_{side}"] == pytest.approx(np.max(profiles), rel=1e-6)
    errors = [line["column_error"] for line in run.diagnostics]
    assert summary["max_column_error"] == pytest.approx(np.max(errors), rel=1e-8)
    for key in ("stream_cosine", "stream_cosine_abs", "stream_rank"):
        assert summary[f"final_{key}"] == pytest.approx(np.mean(last[key]), rel=1e-8)
    assert summary["spikes"] == len(summary["spike_steps"])
    leaves = jax.tree_util.tree_leaves_with_path(final_state(run.folder)["params"])
    sizes = {jax.tree_util.keystr(path): np.size(leaf) for path, leaf in leaves}
    assert summary["parameters"] == sum(sizes.values())
    # 4 sub-layers: phi [64, 24], alpha [3] and bias [24].
    assert summary["connection_parameters"] == 4 * (4 * 16 * 24 + 3 + 24)
    assert summary["connection_parameters"] == sum(v for k, v in sizes.items() if "connection" in k or "ends" in k)


def test_every_key_is_on_the_page_of_numbers(run):
    keys = {key for line in (*run.train, *run.validation, *run.diagnostics, run.summary) for key in line}
    assert {key for line in run.diagnostics for key in line} > {"router_load_cv", "h_res"}
    assert keys > {"router_dropped", "mesh"}
    assert keys - numbers_page.names() - {"kind"} == set()


def test_the_first_lines_of_a_run(config, run):
    """12 steps of 4 x 16 tokens; what is counted here are the arrays of the checkpoint."""
    whole = resolve_tokenizer(config, load_data(config.data))
    parameters = sum(map(np.size, jax.tree.leaves(final_state(run.folder)["params"])))
    model, training, *groups = loop.sizes(whole, abstract_state(whole, None))
    assert [model, training] == [
        f"model: {parameters:,} parameters, {4 * (64 * 24 + 3 + 24):,} of them in connections (mhc:init=home:t_max=2)",
        f"training: 12 steps x 64 tokens = 768 tokens, {768 / parameters:.3g} a parameter",
    ]
    assert groups[0].split("  ")[0] == "updated by"
    assert sum(int(line.split()[3].replace(",", "")) for line in groups[1:]) == parameters
    assert used_devices(config) == f"2 x cpu ({platform.machine()}) of 8, mesh data 2"


def test_flops_of_a_token(config, run):
    """All that is counted beside products, forward and backward, is elementwise."""
    products = model_cost(resolve_tokenizer(config, load_data(config.data)).model, 16).training_flops
    assert products < run.summary["flops_per_token"] < 2 * products
    elementwise = run.summary["flops_per_token"] - products
    # AdamW and the norm of the gradient take about 20 operations a parameter and step.
    assert elementwise > 15 * run.summary["parameters"] / (4 * 16)


def test_measurements_of_the_table_of_results(run):
    found = measurements(read_run(run.folder))
    assert found["max_grad_norm"] == max(line["grad_norm"] for line in run.train if line["step"] > 4)
    assert found["clipped_fraction"] == np.mean([line["clipped"] for line in run.train])


def test_loss_is_the_negative_log_likelihood():
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(0, 5, (3, 4, 7)).astype(np.float32), draw.integers(0, 7, (3, 4))
    logp = special.log_softmax(logits.astype(np.float64), -1)
    nats = [-logp[b, t, targets[b, t]] for b in range(3) for t in range(4)]
    assert float(cross_entropy(jnp.asarray(logits), jnp.asarray(targets))) == pytest.approx(sum(nats) / 12, rel=1e-6)


def test_gradient_norms_are_those_of_the_gradient(config, monkeypatch):
    """Norms are those before clipping, of all parameters and of each block, here summed in float64."""
    whole = resolve_tokenizer(config, load_data(config.data))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(lambda: init_state(whole)))
    grads = jax.tree.map(lambda a: draw.normal(0, 1, a.shape).astype(np.float32), state.params)
    monkeypatch.setattr(train_step, "gradients", lambda config: lambda params, batch: ((jnp.float32(1), {}), grads))
    metrics = jax.jit(train_step.make_train_step(whole))(state, {})[1]
    squares = jax.tree.map(lambda g: float((np.asarray(g, np.float64) ** 2).sum()), grads)
    assert float(metrics["grad_norm"]) == pytest.approx(math.sqrt(sum(jax.tree.leaves(squares))), rel=1e-5)
    blocks = [math.sqrt(sum(jax.tree.leaves(squares[name]))) for name in ("dense_layers", "layers")]
    np.testing.assert_allclose(metrics["grad_norm_per_layer"], blocks, rtol=1e-5)


HAN = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏"


def test_bits_per_byte_are_those_of_the_tokens_that_are_validated(tmp_path):
    """A run on English and Chinese text under BPE validates a part of the held-out text."""
    draw = random.Random(1)
    chinese = ["".join(draw.choice(HAN) for _ in range(150)) for _ in range(20)]
    english = [" ".join(draw.choice(("stream", "gate", "norm", "loss")) for _ in range(80)) for _ in range(20)]
    tokenizer = train_bpe([*english, *chinese[:3]], 320, tmp_path / "bpe.json")
    held_out = [english[0], chinese[0], english[1], *chinese[1:9]]
    for name, texts in (("train", [*english[2:], *chinese[9:]]), ("held-out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = {"validation_source": str(tmp_path / "held-out.jsonl"), "tokenizer": f"bpe:{tmp_path / 'bpe.json'}"}
    config = tiny(tmp_path / "train.jsonl", "residual", data=data, train={"steps": 2, "validation_batches": 10})
    summary = train(config, tmp_path / "run")
    ids = [id for text in held_out for id in (*tokenizer.encode(text).tolist(), tokenizer.end_of_document)]
    windows = [ids[16 * i : 16 * i + 17] for i in range(40)]
    read = tokenizer.decode(id for window in windows for id in window[1:])
    assert "\ufffd" not in read, "the last window ends between two characters"
    assert read.startswith(held_out[0][1:]) or held_out[0][len(held_out[0]) - 50 :] in read
    assert held_out[1] in read

    saved, params = load_params(tmp_path / "run")
    inputs, targets = np.array(windows)[:, :-1], np.array(windows)[:, 1:]
    logits = jax.jit(Decoder(from_mapping(saved).model).apply)({"params": params}, inputs)[0]
    logp = special.log_softmax(np.asarray(logits, np.float64), -1)
    nats = -np.take_along_axis(logp, targets[..., None], -1).sum()
    found = summary["validation_loss"], summary["bits_per_byte"]
    assert found == pytest.approx((nats / 640, nats / math.log(2) / len(read.encode())), rel=1e-6)
    last = read_lines(tmp_path / "run", "validation")[-1]
    assert (last["loss"], last["bits_per_byte"]) == found


def test_the_train_lines_and_the_summary(text, tmp_path):
    """With log_every=3, means and medians over steps are still those over all steps."""
    times, losses, grads = [], [], []
    read = loop.read

    def reading(run, history, step, metrics):
        before = history.clock.seconds["train_s"]
        read(run, history, step, metrics)
        times.append(history.clock.seconds["train_s"] - before)
        losses.append(float(metrics["loss"]))
        grads.append(float(metrics["grad_norm"]))

    clip = {"warmup_steps": 4, "grad_clip": 0.7, "schedule": "wsd"}
    config = tiny(text, "residual", optimizer=clip, train={"steps": 13, "log_every": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "read", reading)
        summary = train(config, tmp_path / "run")
    logged = read_lines(tmp_path / "run", "train", times=True)
    steps = [3, 6, 9, 12, 13]
    assert [(line["step"], line["tokens"]) for line in logged] == [(step, 4 * 16 * step) for step in steps]
    assert [line["loss"] for line in logged] == pytest.approx([losses[step - 1] for step in steps], rel=1e-8)
    assert [line["clipped"] for line in logged] == [int(grads[step - 1] > 0.7) for step in steps]
    rates = [line["learning_rate"] / config.optimizer.learning_rate for line in logged]
    assert rates == pytest.approx([0.75, 1, 1, 0.55, 0.1], rel=1e-6)
    for line in logged:
        assert line["step_time_s"] == pytest.approx(times[line["step"] - 1], rel=1e-5)
        assert line["tokens_per_s"] == pytest.approx(64 / times[line["step"] - 1], rel=1e-5)
    assert summary["train_loss"] == pytest.approx(sum(losses[3:]) / 10, rel=1e-8)
    assert summary["step_time_s"] == pytest.approx(sorted(times)[6], rel=1e-5)
    parts = [f"{name}_s" for name in ("compile", "train", "validation", "diagnostics", "checkpoint")]
    assert summary["wall_clock_s"] == pytest.approx(sum(summary[name] for name in parts), rel=1e-6)
    assert summary["train_s"] == pytest.approx(sum(times), rel=1e-5)
    # Embedding and head of 264 tokens, three norms, attention of 2 query and 1 key-value heads of 8, gated MLP of 16.
    assert summary["parameters"] == 2 * 264 * 16 + 3 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 16
    assert summary["connection_parameters"] == 0
    assert [value for key, value in summary.items() if key.startswith(("max_", "final_"))] == [None] * 6, (
        "no diagnostics"
    )
    # Products of 2 operations a weight and token, three times (forward, and two backward), and attention's two over 16 tokens.
    products = 264 * 16 + (16 * 16 + 2 * 16 * 8 + 16 * 16) + 3 * 16 * 16
    hand = 3 * (2 * products + 2 * 2 * 16 * 16)
    adamw = 15 * summary["parameters"] / 64  # and the norm of the gradient: about 20 operations a parameter and step
    assert hand + adamw < summary["flops_per_token"] < 1.25 * hand, "norms and softmax come on top"


def test_times_are_those_of_the_last_200_steps_however_often_the_run_was_stopped(residual, monkeypatch):
    before, times = History(), iter((0.0, 2.0, 4.0, 6.0, 8.0))
    before.step_times = [9.0] * 100 + [1.0] * 98
    history = History()
    history.restore(json.loads(json.dumps(before.saved())))
    monkeypatch.setattr(runs.history, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    history.clock.restart_step()
    for _ in range(4):
        history.add_step(1.0)
    assert history.step_times == [9.0] * 98 + [1.0] * 98 + [2.0] * 4


def test_the_learning_rate_of_a_step_that_diverges_is_its_own(residual, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "first", 2)
    monkeypatch.setattr(Poisoned, "last", 99)
    assert train(residual, tmp_path / "run", data=poisoned(residual))["status"] == "diverged"
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "run", "train")]
    assert rates == pytest.approx([0.5, 1.0], rel=1e-6), "a warm-up of two steps to 1"


def test_the_peak_is_this_run_s_and_not_that_of_one_before_it(residual, alone, tmp_path, monkeypatch):
    """A stand-in for the counter of a GPU keeps the peak of the whole process."""
    compiled = json.loads((alone / "summary.json").read_text())["peak_memory_bytes"]
    for name, peaks, wanted in (("first", [100, 5000], 5000), ("smaller", [5000, 5000], compiled)):
        with monkeypatch.context() as patch:
            patch.setattr(counts, "device_peak", lambda peaks=iter(peaks): next(peaks))
            assert train(residual, tmp_path / name)["peak_memory_bytes"] == wanted
