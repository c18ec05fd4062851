"""Figures: pure functions from the data of runs (`RunRecord`) to matplotlib figures.

`FIGURES` (single runs) and `sweeps.SWEEP_FIGURES` (runs grouped over seeds) map the name of each figure to its function, title and
caption.  Figures of `streams` show what was found inside trained models.  Nothing else in mhc_jax imports matplotlib.  Figures are
made without pyplot, so that they need no display and do not depend on each other.
"""

from mhc_jax.plots.curves import block_grad_norm, grad_norm, loss, loss_cost, loss_gap
from mhc_jax.plots.mixing import (
    depth_mixing,
    eigenvalues,
    gain_depth,
    gain_step,
    h_res,
    mixing,
    reads_and_writes,
    stream_similarity,
    stream_size,
)
from mhc_jax.plots.streams import stream_ablation, stream_dominance, stream_lens, stream_rescue
from mhc_jax.plots.style import FIGURES, NothingToDraw, Plot, save, smooth, svg

__all__ = [
    "FIGURES",
    "NothingToDraw",
    "Plot",
    "block_grad_norm",
    "depth_mixing",
    "eigenvalues",
    "gain_depth",
    "gain_step",
    "grad_norm",
    "h_res",
    "loss",
    "loss_cost",
    "loss_gap",
    "mixing",
    "reads_and_writes",
    "save",
    "smooth",
    "stream_ablation",
    "stream_dominance",
    "stream_lens",
    "stream_rescue",
    "stream_similarity",
    "stream_size",
    "svg",
]
