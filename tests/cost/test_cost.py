"""Costs against values by hand: FLOPs, parameters, sizes of mHC Table 5, traffic of Table 2, Eq. 20, and printed tables."""

import dataclasses
import importlib
import itertools
import math
import re
import runpy
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from mhc_kernels.ops.arg_specs import SPECS
from support.in_process import run_here
from support.thinned import thin
from support.tiny_runs import ROOT, flags_of, tiny, write_text

from mhc_jax import connections, remat_plan
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.cost import memory_io
from mhc_jax.cost.counts import flops, model_cost, parameter_counts
from mhc_jax.errors import InputError
from mhc_jax.model import Decoder
from mhc_jax.planning import compile_table, pipeline_simulations, slices
from mhc_jax.planning.pipeline_simulations import schedules
from mhc_jax.planning.stage_costs import Rates
from mhc_jax.plots import NothingToDraw
from mhc_jax.plots import cost as figures
from mhc_jax.plots.pipeline import timeline
from mhc_jax.remat import best_block_length, kept_elements
from mhc_jax.timing import device_report
from mhc_jax.train_step import gradients, init_state


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_arithmetic_and_movement():
    assert flops(jnp.dot, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    assert flops(jnp.matmul, array(2, 3, 5), array(2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    assert flops(lambda a: jnp.tanh(a + 1.0) * a, array(4, 6)) == 3 * 24
    assert flops(lambda a: a.sum(), array(4, 6)) == 24
    assert flops(lambda a: jnp.transpose(a).reshape(-1)[:5], array(4, 6)) == 0


def test_a_scan_counts_its_length_and_a_cond_the_dearer_branch():
    def chain(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    assert flops(chain, array(3, 5), array(5, 5)) == 7 * 2 * 3 * 5 * 5
    nested = lambda x, w: jax.lax.scan(lambda c, _: (chain(c, w), None), x, None, length=2)[0]  # noqa: E731
    assert flops(nested, array(3, 5), array(5, 5)) == 2 * 7 * 2 * 3 * 5 * 5

    def either(p, x, w):
        return jax.lax.cond(p, lambda: x @ w, lambda: x + x)

    assert flops(either, jax.ShapeDtypeStruct((), bool), array(3, 5), array(5, 5)) == 2 * 3 * 5 * 5


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_the_gradient_of_a_dense_layer_is_two_more_products(wrap):
    B, m, n = 4, 5, 6

    def loss(w, x):
        return jnp.sum(wrap(jnp.dot)(x, w))

    product, total = 2 * B * m * n, B * n
    assert flops(loss, array(m, n), array(B, m)) == product + total
    assert flops(jax.grad(loss, argnums=(0, 1)), array(m, n), array(B, m)) == 3 * product + total


def test_a_pallas_kernel_counts_every_program():
    def kernel(x, o):
        o[...] = x[...] * 2.0 + 1.0

    block = pl.BlockSpec((8, 4), lambda i: (i, 0))
    call = pl.pallas_call(kernel, array(32, 4), grid=(4,), in_specs=[block], out_specs=block, interpret=True)
    assert flops(call, array(32, 4)) == 2 * 32 * 4


def test_parameters_of_connections_are_counted_apart():
    layers = {"mlp": {"W": array(2, 4, 4)}, "mlp_connection": {"phi": array(2, 8, 3), "alpha": array(2, 3)}}
    params = {"embedding": array(10, 4), "layers": layers, "ends": {"head_bias": array(4)}}
    assert parameter_counts(params) == (40 + 32 + 48 + 6 + 4, 48 + 6 + 4)


def test_a_grouped_product_counts_each_row_once():
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    x, W = array(10, 3), array(4, 3, 5)
    assert flops(jax.lax.ragged_dot, x, W, sizes) == 2 * 10 * 3 * 5
    both = jax.grad(lambda x, W, sizes: jax.lax.ragged_dot(x, W, sizes).sum(), argnums=(0, 1))
    assert flops(both, x, W, sizes) == 3 * 2 * 10 * 3 * 5 + 10 * 5


SMALL = ModelConfig(vocab_size=31, width=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=24)
MLA: dict[str, Any] = {"attention_kind": "mla:kv_rank=6:rope_width=4", "head_width": 10}
EXPERTS: dict[str, Any] = {"experts": "5:active=2:shared=3:width=7"}
SETTINGS = {"gqa": {}, "mla": {"tied_embeddings": True} | MLA, "moe": EXPERTS | MLA}
FAST = {"residual": "gqa", "hc": "mla", "mhc:exit=head:t_max=2": "moe", "gated": "mla", "attnres_block": "gqa"}
"""For each connection the model in which the fast suite counts it."""


def counted(config):
    """Count the parameters of the model, and those of its connections."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    return parameter_counts(jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"])


@pytest.mark.parametrize(("kind", "model"), thin(itertools.product(FAST, SETTINGS), FAST.items().__contains__))
def test_parameters_from_the_configuration_are_those_of_the_model(kind, model):
    config = dataclasses.replace(SMALL, connection=connections.parse(kind), **SETTINGS[model])
    cost = model_cost(config, 4)
    assert (cost.total, cost.connection) == counted(config)
    unseen = 3 * 3 * 16 * 7 * 2 if model == "moe" else 0  # 3 experts a token does not see, in 2 layers
    assert cost.active == cost.total - unseen - (0 if config.tied_embeddings else 31 * 16)


TABLE_5 = {
    "3b": (331e6, 0.612e9, 2.97e9, 39.3e9),
    "9b": (496e6, 1.66e9, 9.18e9, 105e9),
    "27b": (662e6, 4.14e9, 27.0e9, 262e9),
    "3b_1t": (331e6, 0.612e9, 2.97e9, 1.05e12),
}


def config_of(file, arg):
    module = runpy.run_path(f"{ROOT}/experiments/configs/{file}.py")
    return from_mapping(module["get_config"](arg).to_dict())


@pytest.mark.parametrize("size", TABLE_5)
def test_the_papers_models_have_the_papers_sizes(size):
    config = config_of("paper", f"{size}:residual")
    vocabulary, active, total, tokens = TABLE_5[size]
    cost = model_cost(config.model, config.data.sequence_length)
    assert cost.vocabulary == 2 * 129280 * config.model.width
    assert cost.vocabulary == pytest.approx(vocabulary, rel=1e-3)
    assert cost.active == pytest.approx(active, rel=1e-2)
    assert cost.total == pytest.approx(total, rel=1e-2)
    assert config.train.steps * config.data.batch_size * config.data.sequence_length == pytest.approx(tokens, rel=5e-3)
    assert counted(config.model)[0] == cost.total


@pytest.mark.parametrize("rung", ["w160", "w320", "w640", "w960"])
def test_the_ladder_climbs_towards_3b_at_64_tokens_a_parameter(rung):
    hc, residual = (config_of("ladder", f"{rung}:{kind}") for kind in ("hc", "residual"))
    assert hc.train == residual.train, "every connection gets the same tokens"
    assert hc.optimizer == residual.optimizer
    cost = model_cost(residual.model, residual.data.sequence_length)
    tokens = residual.train.steps * residual.data.batch_size * residual.data.sequence_length
    assert tokens / cost.active == pytest.approx(64, rel=1e-2)
    assert 1e6 < cost.active < 612e6


@pytest.mark.parametrize("settings", [{}, {"experts": "5:active=2:shared=3:width=256"}], ids=["gqa", "moe"])
def test_training_flops_are_those_of_the_gradient(settings):
    """What `model_cost` leaves out is elementwise; at this width products dominate."""
    wide = {"width": 256, "num_heads": 4, "mlp_width": 768, "connection": connections.parse("mhc:t_max=2")}
    config = dataclasses.replace(SMALL, **settings | wide)
    experiment = ExperimentConfig(model=config, data=DataConfig(sequence_length=128, batch_size=2))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    params = jax.eval_shape(lambda: init_state(experiment)).params
    whole = flops(gradients(experiment), params, {"inputs": tokens, "targets": tokens})
    assert model_cost(config, 128).training_flops == pytest.approx(whole / 256, rel=0.05)


@pytest.mark.parametrize(("n", "C"), [(1, 8), (4, 128), (8, 2560)])
def test_tables_of_the_paper(n, C):
    small, unfused, merged = n * n + 2 * n, memory_io.unfused(n, C), memory_io.merged(n, C)
    assert memory_io.total(unfused) == ((5 * n + 1) * C + small, (3 * n + 1) * C + small)
    write = [unfused[key] for key in ("apply H_post", "apply H_res", "merge")]
    assert sum(row.read for row in write) == (3 * n + 1) * C + n * n + n
    assert merged["write"] == ((n + 1) * C + n * n + n, n * C)
    assert sum(row.written for row in write) == 3 * n * C


@pytest.mark.parametrize(("L", "n"), [(60, 4), (24, 2), (1, 4), (128, 8)])
def test_best_recompute_is_near_the_root(L, n):
    best = best_block_length(L, n)
    kept = [kept_elements(L_r, L, n, 3) for L_r in range(1, L + 1)]
    assert kept[best - 1] == min(kept)
    assert best == pytest.approx((n * L / (n + 2)) ** 0.5, abs=1.5)


def test_figures_of_cost():
    """Traffic of mHC Table 2 at n = 4, in C: 21 read and 13 written; fused 13 and 5; with the pre-norm 20, 14 and 10.

    Memory is nC ceil(L / L_r) + (n + 2) C L_r elements of two bytes, in KiB.
    """
    assert list(memory_io.boundary(4, 1).values()) == [20, 14, 10]
    assert memory_io.residual(7) == (14, 7)
    bars = figures.traffic_bars(4, 10_000).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [2, 21, 13, 1, 13, 5, 20, 14, 10], atol=0.003)
    assert "C = 10000" in bars.get_xlabel()
    assert [text.get_text().strip() for text in bars.texts][:2] == ["3.0", "34.0"]
    curves = figures.recompute(60, (4, 2), 2560).axes[0]
    expected = [(4 * math.ceil(60 / k) + 6 * k) * 2560 * 2 / 1024 for k in range(1, 61)]
    np.testing.assert_allclose(curves.lines[0].get_ydata(), expected)
    assert (curves.lines[1].get_xdata()[0], curves.lines[1].get_ydata()[0]) == (6, min(expected))
    assert curves.get_ylabel() == "KiB per token (C = 2560, 2 bytes)"
    labels = [label for line in curves.lines if not (label := str(line.get_label())).startswith("_")]
    assert labels == ["n = 4: best L_r = 6", "n = 2: best L_r = 5"]
    ratios = figures.overhead({"parameters": {"hc": 1.25, "mhc": 1.5}, "time": {"hc": 2.0}}).axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in ratios.patches], [1.25, 2.0, 1.5, np.nan])
    assert [text.get_text() for text in ratios.texts][:2] == ["1.25", "2.00"]
    with pytest.raises(NothingToDraw, match="no ratios"):
        figures.overhead({})
    with pytest.raises(InputError, match="from 1 to L = 4"):
        kept_elements(5, 4, 4, 8)


def test_roofline_of_a_device_record():
    row = {"op": "read", "pass": "forward", "spec": {"name": "tiny"}, "implementation": "xla", "status": "ok"}
    report = {"copy_bytes_per_s": 2e11, "parts": {"bench/tiny/read": [{**row, "copy_share": 0.8}], "step/tiny": {}}}
    axis = figures.roofline(report).axes[0]
    assert axis.lines[0].get_xdata()[0] == pytest.approx(80)
    assert "200 GB/s" in axis.get_xlabel()
    with pytest.raises(NothingToDraw, match="no timed kernel"):
        figures.roofline({"parts": {"bench/tiny/read": [{**row, "status": "no GPU"}]}})


SIZES = {"vocab_size": 8, "width": 256, "num_layers": 8, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 512}
PAPER = ModelConfig(**SIZES, stream_dtype="bfloat16", connection=connections.parse("mhc"))
RATES = Rates(flops=1e12, bandwidth=1e11, link=1e9)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def printed(text):
    """Rows of the first table of a text, as heading -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((k for k, line in enumerate(lines[2:], 2) if set(line) <= set("| -")), len(lines) + 1)
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2 : end - 1]]


def test_a_row_of_a_pipeline_by_hand():
    """1F1B on 4 devices: 8 microbatches of F + B = 3 each, a wait of 3 (F + B), and at most 4 microbatches alive."""
    rows = pipeline_simulations.of_hand(schedules(["1f1b"], 4, 8), 1.0, 2.0, 1.0, 1.0, 0.0)
    (row,) = printed(pipeline_simulations.markdown(rows))
    expected = {"schedule": "1f1b", "connection": "", "devices x stages": "4 x 4", "step": f"{8 * 3 + 3 * 3}"}
    expected |= {"longest wait": f"{3 * 3}", "waiting (%)": f"{100 * 9 / 33:.1f}", "messages exposed": "0"}
    assert row == {**expected, "activations (stages)": "4", "kept by connections (GB)": "", "over the first": ""}
    axis = timeline([rows[0].run], ["one"], rows[0].unit).axes[0]
    assert axis.get_xlabel() == "time"
    assert sorted(cell.get_width() for cell in axis.patches) == pytest.approx([1.0] * 32 + [2.0] * 32)
    many = pipeline_simulations.of_hand(schedules(["gpipe"], 2, 1500), 1.0, 2.0, 1.0, 1.0, 0.0)
    (many,) = printed(pipeline_simulations.markdown(many))
    assert (many["activations (stages)"], many["kept by connections (GB)"]) == ("1500", "")


def test_a_row_of_a_pipeline_of_a_model_has_seconds_and_bytes():
    config = ExperimentConfig(model=PAPER, data=DataConfig(sequence_length=4096))
    rows = pipeline_simulations.of_model(schedules(["1f1b"], 4, 8), config, ["residual", "mhc:t_max=2"], RATES, 1.0)
    residual, mhc, _ = printed(pipeline_simulations.markdown(rows))
    assert mhc["step (s)"] == f"{rows[1].run.makespan:.4g}"
    assert mhc["over the first"] == f"{100 * (rows[1].run.makespan / rows[0].run.makespan - 1):+.2f} %"
    assert timeline([rows[0].run], ["one"], rows[0].unit).axes[0].get_xlabel() == "time (s)"
    # Four microbatches on the first device: two blocks of two sub-layers, each keeps n streams, h and y of 4096 tokens.
    assert mhc["kept by connections (GB)"] == f"{4 * 2 * 2 * 6 * 256 * 2 * 4096 / 1e9:.2f}"
    assert float(residual["kept by connections (GB)"]) < float(mhc["kept by connections (GB)"])


def test_operations_of_a_compiled_pipeline():
    seconds = {"F": [0.001, 0.004], "B": [0.002, 0.0], "W": [0.0005, 0.0], "message": 0.0003, "tick": 0.0}
    found = {"schedule": "zb1p", "stages": 4, "seconds": seconds, "pair": 0.94, "bubble_fraction": 0.125}
    found["messages"] = {"a tick": 2, "asynchronous": 1, "hidden": 0, "bytes": 10}
    (row,) = printed("\n".join(compile_table.pipelines([{"connection": "mhc", "pipeline": found}])))
    assert list(row.values()) == ["mhc", "zb1p", "4", "4.00", "2.00", "0.50", "0.94", "0.30", "12.5", "2", "1", "0"]
    assert "waiting (%)" in row


def test_chips_are_those_of_the_published_pages():
    """Published per chip: bfloat16 TFLOP/s, GB/s and GiB of memory, Gbit/s of all ports, number of ports, devices."""
    published = {
        "v4": (275, 1200, 32, 2400, 6, 2),
        "v5e": (197, 819, 16, 1600, 4, 1),
        "v5p": (459, 2765, 95, 4800, 6, 1),
        "v6e": (918, 1640, 32, 3584, 4, 1),
    }
    assert set(published) == set(slices.CHIPS)
    for name, (speed, bandwidth, memory, bits, ports, devices) in published.items():
        chip = slices.CHIPS[name]
        assert (chip.devices, 2 * chip.dimensions, chip.hbm * devices) == (devices, ports, memory * 2**30)
        rates = [devices * rate for rate in (chip.flops, chip.bandwidth, chip.link * ports * 8)]
        assert rates == pytest.approx([speed * 1e12, bandwidth * 1e9, bits * 1e9])


def test_the_textbook_table_has_medians_and_their_ratio(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    bench = importlib.import_module("bench")
    times = {"ours": [0.002, 0.001, 0.004], "textbook": [0.006, 0.005, 0.009]}
    monkeypatch.setattr(bench, "alternating", lambda batches, rounds: {name: times[name] for name in batches})
    rows = bench.textbook_rows(2, 16, 3)
    for row in rows:
        assert (row["ours_ms"], row["textbook_ms"], row["ratio"]) == pytest.approx((2, 6, 3))
        assert row["largest_relative_error"] < 1e-5
    row = cells(bench.textbook_table(rows).splitlines()[2])
    assert row == ["sinkhorn", "forward", "2", "16", "2.00", "6.00", "3.0"]


def test_the_page_of_a_device():
    """Two layers and 2 x 4096 tokens make 4 x 8192 pairs of sub-layer and token."""
    step = {"shape": {"name": "27b", "width": 2560, "num_heads": 32, "mlp_width": 12288}, "batch_size": 2}
    mhc = {"name": "mhc xla", "status": "ok", "ms": 105.0, "overhead": 0.05, "memory_bytes": 3 * 2**30, "loss": 6.93}
    mhc["us_per_sublayer_token"] = 1e6 * 0.005 / (4 * 8192)
    gate = {"errors": {"h": 3e-6, "dx": 8e-3}, "allowed": {"h": 1e-5, "dx": 2.0**-6}}
    correct = {"op": "read", "spec": dataclasses.asdict(SPECS["27b"]), "implementation": "xla", "status": "ok"} | gate
    env = {"device": "D", "command": "c", "date": "d", "commit": "0", "dirty": False, "python": "3", "packages": {}}
    parts = {"correct/27b/read": [correct], "step/27b": {**step, "attention": "cudnn", "steps": [mhc]}}
    text = device_report.readme({"env": env, "parts": parts, "left": []})
    assert "| read | 27b (16384 x 4 x 2560, bfloat16) | xla | ok | 8.0e-03 (dx, 2e-02) |" in text
    (row,) = printed(text[text.index("## Train step") :])
    expected = {"connection": "mhc xla", "step (ms)": "105.00", "over residual": "+5.0 %"}
    expected |= {"adds (ns a sub-layer and token)": f"{1e9 * 0.005 / (4 * 8192):.2f}", "compiled memory (GiB)": "3.0"}
    assert row == {**expected, "loss of step 2 (nats/token)": "6.9300", "predicted over residual": ""}


def test_the_sentence_about_recompute_says_its_estimates():
    config = dataclasses.replace(PAPER, connection=connections.parse("mhc:t_max=2"), remat="auto:1e-9")
    found = remat_plan.plan(config, 4096, 128)
    listed = dict(re.findall(r"(\w+) ([\d.]+) GB", found.sentence.partition("estimates: ")[2]))
    rounded = {name: pytest.approx(found.estimates[name] / 1e9, rel=5e-3) for name in ("none", "connection", "full")}
    assert {name: float(size) for name, size in listed.items()} == rounded
    assert f"more than the {1e-9:g} GB there are" in found.sentence
    free = remat_plan.plan(dataclasses.replace(config, remat="auto"), 4096, 128)
    assert f"with L_r = {free.L_r} of 16 sub-layers" in free.sentence


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return [flag for flag in flags_of(tiny(text)) if ".vocab_size" not in flag]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a quarter of a second at every look, so that printed times do not depend on the machine."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 4)


def test_the_table_of_step_times(flags, clock):
    status, out, err = run_here("steptime", *flags, "--connections=residual,mhc:t_max=2", "--rounds=1")
    assert status == 0, err
    rows = printed(out)
    assert [row["connection"] for row in rows] == ["residual", "mhc:init=paper:t_max=2"]
    base = float(rows[0]["step (ms)"])
    for row, kind in zip(rows, ("residual", "mhc:t_max=2"), strict=True):
        assert float(row["ratio"]) == pytest.approx(float(row["step (ms)"]) / base, abs=0.01 + 0.06 / base)
        model = ModelConfig(264, 16, 1, num_heads=2, num_kv_heads=1, mlp_width=16, connection=connections.parse(kind))
        counted, size = model_cost(model, 16), re.fullmatch(r"([\d.]+)M", row["FLOPs/token"])
        # Products by hand; AdamW's and the norms' operations come on top, at most 25 a parameter and step of 64 tokens.
        assert counted.training_flops < float(size[1]) * 1e6 < counted.training_flops * 1.6 + 25 * counted.total / 64
        assert int(row["fusions"]) > 0
    assert rows[0]["ratio"] == "1.00"


def test_the_table_of_decoding(flags, clock):
    status, out, err = run_here(
        "decodetime",
        *flags,
        "--config.data.sequence_length=64",
        "--connections=residual,mhc:t_max=2",
        "--rounds=1",
    )
    assert status == 0, err
    rows = printed(out)
    assert rows[0]["ratio"] == "1.00"
    assert "one sequence of 64 tokens" in out
    for row in rows:
        cached, plain = float(row["with cache (ms/token)"]), float(row["without (ms/token)"])
        rounding = 0.06 / plain + 0.006 / cached + 0.06 * cached / plain
        assert float(row["without / with"]) == pytest.approx(plain / cached, rel=rounding)
