"""Figures: pure functions from run records to matplotlib figures.

`FIGURES` (single runs) and `sweeps.SWEEP_FIGURES` (runs grouped over seeds) map each name to a function, its title and its caption.
This package alone imports matplotlib.  It draws on Figure objects of its own and never touches pyplot, so that no figure depends
on another figure or on a display.
"""

from mhc_jax.plots.curves import block_grad_norm, grad_norm, loss, loss_cost, loss_gap
from mhc_jax.plots.mixing import (
    eigenvalues,
    gain_depth,
    gain_step,
    h_res,
    mixing,
    reads_and_writes,
    stream_similarity,
    stream_size,
)
from mhc_jax.plots.style import FIGURES, NothingToDraw, Plot, save, smooth, svg

__all__ = [
    "FIGURES",
    "NothingToDraw",
    "Plot",
    "block_grad_norm",
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
    "stream_similarity",
    "stream_size",
    "svg",
]
