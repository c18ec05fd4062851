"""Figures: pure functions from the data of runs (`RunRecord`) to matplotlib figures.

`FIGURES` (single runs) and `sweeps.SWEEP_FIGURES` (runs grouped over seeds) map the name of each figure to its function, title and
caption.  Figures of `streams` show what was found inside trained models.  Nothing else in mhc_jax imports matplotlib.  Figures are
made without pyplot, so that they need no display and do not depend on each other.
"""

from mhc_jax.plots.axes import smooth
from mhc_jax.plots.curves import block_grad_norm, grad_norm, loss, loss_cost, loss_gap
from mhc_jax.plots.heat_maps import depth_mixing, h_res, reads_and_writes
from mhc_jax.plots.mixing import eigenvalues, gain_depth, gain_step, mixing, stream_similarity, stream_size
from mhc_jax.plots.sizes import NARROW, SIZES, Size, drawn_at
from mhc_jax.plots.streams import stream_ablation, stream_dominance, stream_lens, stream_rescue
from mhc_jax.plots.style import FIGURES, NothingToDraw, Plot, panel_names, save, svg, write

__all__ = [
    "FIGURES",
    "NARROW",
    "SIZES",
    "NothingToDraw",
    "Plot",
    "Size",
    "block_grad_norm",
    "depth_mixing",
    "drawn_at",
    "eigenvalues",
    "gain_depth",
    "gain_step",
    "grad_norm",
    "h_res",
    "loss",
    "loss_cost",
    "loss_gap",
    "mixing",
    "panel_names",
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
    "write",
]
