"""Figures of streams inside a model show the numbers of its ablation, rescue, logit lens and dominant stream."""

import numpy as np
from support.synthetic_runs import legend_texts

from mhc_jax import plots
from mhc_jax.analysis.streams import Dominance, Lens, Rescue


def test_figures_of_what_is_inside_a_model():
    """Two models of 3 and 2 streams with 4 sub-layers, at 2 x 6 tokens."""
    random = np.random.default_rng(0)
    sizes = {"hc": 3, "mhc:init=home": 2}
    lost = {label: {by: random.normal(size=n) for by in ("zero", "mean")} for label, n in sizes.items()}
    figure = plots.stream_ablation(lost)
    for axis, by in zip(figure.axes, ("zero", "mean"), strict=True):
        heights = [bar.get_height() for bar in axis.patches]
        np.testing.assert_array_equal(heights, [*lost["hc"][by], *lost["mhc:init=home"][by]])
        centres = [round(bar.get_x() + bar.get_width() / 2) for bar in axis.patches]
        assert centres == [1, 2, 3, 1, 2]
    assert legend_texts(figure) == list(sizes)

    shares = {label: random.uniform(0, 1, (5, n)) for label, n in sizes.items()}
    shares["hc"][0] = np.nan
    figure = plots.stream_rescue({label: Rescue(share, 2.0, 3.0) for label, share in shares.items()})
    for axis, (label, share) in zip(figure.axes, shares.items(), strict=False):
        shown = np.ma.filled(axis.collections[0].get_array(), np.nan)
        np.testing.assert_array_equal(shown, share.T)
        assert axis.get_title("left") == label
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "3", "4", "exit"]

    largest = {label: random.uniform(0, 1, 5) for label in sizes}
    figure = plots.stream_dominance({label: Dominance(shares[label], largest[label]) for label in sizes})
    np.testing.assert_array_equal(figure.axes[1].collections[0].get_array(), shares["mhc:init=home"].T)
    curves = [line for line in figure.axes[2].lines if line.get_label() in sizes]
    assert {line.get_label(): line.get_ydata().tolist() for line in curves} == {
        k: v.tolist() for k, v in largest.items()
    }
    levels = [line.get_ydata()[0] for line in figure.axes[2].lines if line not in curves]
    assert sorted(levels) == [1 / 3, 1 / 2]

    lenses = {}
    for label, n in sizes.items():
        ids = np.zeros((5, 2, 6), int)
        losses = random.uniform(0, 5, (5, n + 1, 2, 5))
        lenses[label] = Lens(losses[:, :n], np.stack([ids] * n, 1), losses[:, n], ids)
    figure = plots.stream_lens(lenses)
    for axis, (label, lens) in zip(figure.axes, lenses.items(), strict=True):
        collapsed, *alone = [line.get_ydata() for line in axis.lines]
        np.testing.assert_allclose(collapsed, lens.collapsed_loss.reshape(5, -1).mean(1))
        np.testing.assert_allclose(alone, lens.loss.reshape(5, sizes[label], -1).mean(2).T)
        assert axis.get_title("left") == label
    assert legend_texts(figure) == ["all streams, collapsed", "stream 1", "stream 2", "stream 3"]
