"""The numbers that a run writes, against its own files, float64 loops and hand counts: one tiny run with experts on two devices."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numbers_page
import numpy as np
import pytest
from scipy import special
from tiny_runs import final_state, tiny, write_text

from mhc_jax.config import MeshConfig
from mhc_jax.cost import model_cost
from mhc_jax.data import load_data, resolve_vocabulary
from mhc_jax.loop import train
from mhc_jax.model import cross_entropy
from mhc_jax.records import read_run
from mhc_jax.results import measurements
from mhc_jax.train_step import gradients, init_state, make_train_step

EXPERTS = {"num_experts": 4, "num_active_experts": 2, "expert_width": 8, "num_layers": 2, "num_dense_layers": 1}
STEPS, EVERY = 12, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    settings = {
        "steps": STEPS,
        "diagnostics_every": EVERY,
        "validate_every": 6,
        "checkpoint_every": 0,
        "spike_window": 8,
    }
    model, optimizer = {**EXPERTS, "expert_buffer": 1.0}, {"grad_clip": 2.0, "warmup_steps": 4}
    return dataclasses.replace(
        tiny(text, "mhc:init=home", model=model, optimizer=optimizer, train=settings), mesh=MeshConfig(data=2)
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def lines(run):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line for line in read if line["kind"] == kind] for kind in ("train", "validation", "diagnostics")}


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_a_train_line(lines):
    clipped = set()
    for line in lines["train"]:
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["tokens_per_s"] == pytest.approx(4 * 16 / line["step_time_s"], rel=1e-6)
        assert line["clipped"] == int(line["grad_norm"] > 2.0)
        clipped.add(line["clipped"])
    assert clipped == {0, 1}, "a threshold that tells something"


def test_numbers_of_the_summary(run, lines, summary):
    assert summary["train_loss"] == pytest.approx(np.mean([line["loss"] for line in lines["train"][-10:]]), rel=1e-7)
    for side in ("forward", "backward"):
        profiles = [line[f"composite_{side}"] for line in lines["diagnostics"]]
        assert summary[f"max_composite_{side}"] == pytest.approx(np.max(profiles), rel=1e-6)
    errors = [line["column_error"] for line in lines["diagnostics"]]
    assert summary["max_column_error"] == pytest.approx(np.max(errors), rel=1e-8)
    last = lines["diagnostics"][-1]
    for key in ("stream_cosine", "stream_cosine_abs", "stream_rank"):
        assert summary[f"final_{key}"] == pytest.approx(np.mean(last[key]), rel=1e-8)
    clocks = ("compile_s", "train_s", "validation_s", "diagnostics_s", "checkpoint_s")
    assert summary["wall_clock_s"] == pytest.approx(sum(summary[clock] for clock in clocks), rel=1e-7)
    assert summary["train_s"] == pytest.approx(sum(line["step_time_s"] for line in lines["train"]), rel=1e-6)
    times = [line["step_time_s"] for line in lines["train"]]
    assert summary["step_time_s"] == pytest.approx(float(np.median(times)), rel=1e-6)
    assert summary["spikes"] == len(summary["spike_steps"])
    sizes = {
        jax.tree_util.keystr(path): np.asarray(leaf).size
        for path, leaf in jax.tree_util.tree_leaves_with_path(final_state(run)["params"])
    }
    assert summary["parameters"] == sum(sizes.values())
    # 4 sub-layers: phi [64, 24], alpha [3] and bias [24].
    assert summary["connection_parameters"] == 4 * (4 * 16 * 24 + 3 + 24)
    assert summary["connection_parameters"] == sum(v for k, v in sizes.items() if "connection" in k or "ends" in k)


def test_what_was_not_measured_is_null(config, tmp_path):
    quiet = dataclasses.replace(config.train, steps=4, diagnostics_every=0, validate_every=0)
    summary = train(dataclasses.replace(config, train=quiet), tmp_path / "run")
    found = [key for key in summary if key.startswith(("max_", "final_"))]
    assert len(found) == 6
    assert [summary[key] for key in found] == [None] * 6


def test_every_key_is_on_the_page_of_numbers(run, lines, summary):
    keys = {key for kind in lines.values() for line in kind for key in line} | set(summary)
    keys |= {"router_dropped", "mesh"}
    assert {key for line in lines["diagnostics"] for key in line} > {"router_load_cv", "h_res"}
    assert keys - numbers_page.names() - {"kind"} == set()


def test_flops_of_a_token(config, summary):
    """Products of the branches, scores, router and connection, forward and backward; what else it counts is elementwise."""
    model = resolve_vocabulary(config, load_data(config.data)).model
    cost = model_cost(model, 16)
    assert cost.training_flops < summary["flops_per_token"] < 2 * cost.training_flops
    elementwise = summary["flops_per_token"] - cost.training_flops
    # AdamW and the norm of the gradient take about 20 operations a parameter and step.
    assert elementwise > 15 * summary["parameters"] / (4 * 16)


def test_measurements_of_the_table_of_results(run, lines):
    found = measurements(read_run(run))
    norms = [line["grad_norm"] for line in lines["train"] if line["step"] > 4]
    assert found["max_grad_norm"] == max(norms)
    assert found["clipped_fraction"] == np.mean([line["clipped"] for line in lines["train"]])


def test_loss_is_the_negative_log_likelihood():
    random = np.random.default_rng(0)
    logits, targets = random.normal(0, 5, (3, 4, 7)).astype(np.float32), random.integers(0, 7, (3, 4))
    logp = special.log_softmax(logits.astype(np.float64), -1)
    nats = [-logp[b, t, targets[b, t]] for b in range(3) for t in range(4)]
    assert float(cross_entropy(jnp.asarray(logits), jnp.asarray(targets))) == pytest.approx(sum(nats) / 12, rel=1e-6)


def test_gradient_norms_are_those_of_the_gradient(config):
    """Before clipping, over all parameters and over those of each block, summed in float64."""
    whole = resolve_vocabulary(config, load_data(config.data))
    state = jax.jit(lambda: init_state(whole))()
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (4, 17))
    batch = {"inputs": np.int32(tokens[:, :-1]), "targets": np.int32(tokens[:, 1:])}

    def both(state, batch):
        return gradients(whole)(state.params, batch)[1], make_train_step(whole)(state, batch)[1]

    grads, metrics = jax.jit(both)(state, batch)
    squares = jax.tree.map(lambda g: float((np.asarray(g, np.float64) ** 2).sum()), grads)
    assert float(metrics["grad_norm"]) == pytest.approx(math.sqrt(sum(jax.tree.leaves(squares))), rel=1e-5)
    blocks = [math.sqrt(sum(jax.tree.leaves(squares[name]))) for name in ("dense_layers", "layers")]
    np.testing.assert_allclose(metrics["grad_norm_per_layer"], blocks, rtol=1e-5)
