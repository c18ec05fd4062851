"""Conversion of DeepSeek-V4's weights both ways, and the golden values through converted parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import EXPERTS, decoder_of, drawn_decoder
from support.golden_values import load
from support.tolerances import GOLDEN, assert_close

from mhc_jax import connections
from mhc_jax.connections.convert import from_deepseek_v4, to_deepseek_v4
from mhc_jax.errors import InputError

N, n, C = 3, 4, 24  # at n = 2 doubly stochastic matrices are symmetric, and a lost transpose would not show


def golden_weights():
    """A checkpoint of N blocks: the golden module is the feed-forward of block 1, and all others are random."""
    g, head = load(f"deepseek_v4_n{n}"), load(f"deepseek_v4_head_n{n}")
    rng = np.random.default_rng(0)
    weights = {}
    for part in ("fn", "base", "scale"):
        names = [f"layers.{i}.hc_{branch}_{part}" for i in range(N) for branch in ("attn", "ffn")]
        weights |= {name: rng.normal(size=g[part].shape).astype(np.float32) for name in names}
        weights |= {f"layers.1.hc_ffn_{part}": np.asarray(g[part]), f"hc_head_{part}": np.asarray(head[f"hc_{part}"])}
    return weights, g, head


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_there_and_back_is_bitwise(dtype):
    weights = {name: a.astype(dtype) for name, a in golden_weights()[0].items()}
    back = to_deepseek_v4(from_deepseek_v4({**weights, "embed.weight": np.ones(3)}, N, n, C))
    assert set(back) == set(weights)
    for name in weights:
        np.testing.assert_array_equal(back[name], weights[name], strict=True)


def test_converted_parameters_give_the_golden_values():
    weights, g, head = golden_weights()
    params = from_deepseek_v4(weights, N, n, C)
    config = connections.parse(f"mhc:eps_convention=v4:exit=head:num_streams={n}")
    link, ends = (connections.connection_module(config)(config, C, 2 * N, l) for l in (3, None))
    variables = {"params": jax.tree.map(lambda a: jnp.asarray(a[1]), params["layers"]["mlp_connection"])}
    x = g["x"].reshape(*g["x"].shape[:2], -1)
    c = link.apply(variables, x, method="coefficients")
    assert_close(link.apply(variables, x, c, method="read"), g["h"], GOLDEN, "h")
    assert_close(link.apply(variables, x, c, g["y"], method="write").reshape(g["x"].shape), g["x_out"], GOLDEN, "x_out")
    flat = head["x"].reshape(*head["x"].shape[:2], -1)
    out = ends.apply({"params": jax.tree.map(jnp.asarray, params["ends"])}, flat, c, method="collapse")
    assert_close(out, head["out"], GOLDEN, "out")


@pytest.mark.parametrize("settings", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_tree_is_the_decoders(settings):
    """With experts the leading blocks lie apart, and the checkpoint's numbers count through both parts."""
    config = decoder_of("mhc:eps_convention=v4:exit=head:num_streams=2", **settings)
    params = drawn_decoder(config)
    weights = to_deepseek_v4(params)
    assert {name.split(".")[1] for name in weights if name.startswith("layers.")} == set("012")
    assert weights["layers.2.hc_attn_fn"].shape == (8, 2 * config.width)
    scales = [params[part]["mlp_connection"]["alpha"] for part in ("dense_layers", "layers") if part in params]
    np.testing.assert_array_equal([weights[f"layers.{i}.hc_ffn_scale"] for i in range(3)], np.concatenate(scales))
    again = from_deepseek_v4(weights, config.num_layers, 2, config.width, config.num_leading)
    assert set(again) == {"layers", "ends"} | ({"dense_layers"} if settings else set())
    for part, trees in again.items():
        for name, tree in trees.items():
            jax.tree.map(np.testing.assert_array_equal, tree, params[part][name])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("layers.2.hc_attn_base"), r"layers.2.hc_attn_base is missing .* shape \[24\]"),
        (lambda w: w.update(hc_head_scale=np.ones(2)), r"hc_head_scale has the shape \[2\], and \[1\] was expected"),
        (lambda w: w.update({"layers.0.hc_ffn_fn": np.ones((96, 24))}), r"shape \[96, 24\], and \[24, 96\]"),
    ],
)
def test_weights_that_do_not_fit_are_told(change, sentence):
    weights = golden_weights()[0]
    change(weights)
    with pytest.raises(InputError, match=sentence):
        from_deepseek_v4(weights, N, n, C)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.pop("ends"), "no ends/head_phi"),
        (lambda p: p["layers"].pop("mlp_connection"), "layers/mlp_connection/phi is missing"),
        (lambda p: p["layers"]["mlp_connection"].update(alpha=jnp.ones((N, 2))), r"alpha has the shape \[3, 2\]"),
        (
            lambda p: p["layers"]["mlp_connection"].update(write_phi=1),
            "mlp_connection/ has write_phi, which DeepSeek-V4 has not",
        ),
    ],
)
def test_parameters_of_another_connection_are_told(change, sentence):
    params = from_deepseek_v4(golden_weights()[0], N, n, C)
    change(params)
    with pytest.raises(InputError, match=sentence):
        to_deepseek_v4(params)
