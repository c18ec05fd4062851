"""Weights of sources of earlier depth: what diagnostics give, and the figure of them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support.decoders import TOKENS, decoder_of, drawn_decoder
from support.synthetic_runs import make_run
from support.tolerances import assert_close

from mhc_jax import plots
from mhc_jax.diagnostics import summarize
from mhc_jax.model import Decoder

SPEC = "attnres_block:block_size=1:heads=2"


@functools.cache
def collected():
    """Diagnostics of five tokens under the initial queries, 0, and under random ones."""
    config = decoder_of(SPEC)
    params = drawn_decoder(config)
    run = jax.jit(lambda params: Decoder(config).apply({"params": params}, TOKENS, 5)[1])
    zero = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if path[-1].key == "w" else a, params)
    return run(zero), run(params)


def test_depth_mixing_is_the_mean_of_the_weights_of_the_sources():
    """Equal queries weigh the l sources of sub-layer l alike.  Means over tokens and heads of softmaxes sum to 1."""
    alike, random = (summarize(found)["depth_mixing"] for found in collected())
    assert_close(alike, [[1 / l] * l + [0] * (7 - l) for l in range(1, 7)])
    assert_close(random.sum(1), np.ones(6))
    assert np.abs(random - alike).max() > 0.01
    by_token = np.asarray(collected()[1]["source_weights"])
    assert by_token.shape == (6, 5, 7)
    assert by_token.std(1).max() > 1e-3


def with_weights(record, weights):
    lines = [{**line, "depth_mixing": np.asarray(weights)} for line in record.diagnostics]
    return dataclasses.replace(record, diagnostics=lines)


def test_the_figure_shows_the_weights_of_each_run_and_leaves_zeros_blank(tmp_path):
    weights = [np.array([[1.0, 0], [0.25, 0.75]]), np.array([[0.0, 0], [0.02, 0], [-0.01, 0.04]])]
    without, *runs = (make_run(tmp_path, name, kind) for name, kind in (("a", "residual"), ("b", "hc"), ("c", "mhc")))
    runs = [with_weights(record, w) for record, w in zip(runs, weights, strict=True)]
    figure = plots.depth_mixing([without, *runs])
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert [axis.get_title(loc="left") for axis in axes] == ["hc (step 200)", "mhc:init=paper (step 200)"]
    assert len(figure.axes) == 4, "each has a bar of its colours"
    for axis, w in zip(axes, weights, strict=True):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("sub-layer l", "source j")
        shown = axis.collections[0].get_array().reshape(w.T.shape)
        np.testing.assert_array_equal(shown.mask, w.T == 0)
        np.testing.assert_array_equal(shown.filled(0), w.T)
        assert axis.yaxis_inverted()
    scales = [axis.collections[0].norm for axis in axes]
    assert [(norm.vmin, norm.vmax) for norm in scales] == [(0, 1), (-0.04, 0.04)]
    assert len([axis for axis in plots.depth_mixing([*runs, runs[0]]).axes if axis.axison]) == 6


def test_without_such_weights_the_figure_says_so(tmp_path):
    with pytest.raises(
        plots.NothingToDraw, match="no diagnostics with depth_mixing, which connections that read sources"
    ):
        plots.depth_mixing([make_run(tmp_path, "residual", "residual")])
