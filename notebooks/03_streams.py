# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Streams: mixing, specialisation, collapse (mHC, Figure 8)
#
# $H^{res}$ is applied without a transpose: row i makes stream i. HC's is unconstrained and signed. mHC's is doubly
# stochastic (mHC Eq. 6), so that products are doubly stochastic too and tend to $\tfrac1n \mathbf{1}\mathbf{1}^T$. The
# figures show the sweep `connections` after the last step: heat maps seed 0, curves the mean of three seeds. Matrices
# are means over tokens.

# %%
# %matplotlib inline
from pathlib import Path

import numpy as np
from IPython.display import Markdown, display

from mhc_jax import plots
from mhc_jax.analysis.comparison import Cell, statistics_rows
from mhc_jax.analysis.grouping import group, mean_record
from mhc_jax.analysis.run_reader import last_diagnostics
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.record import read_newest

RECORDS = Path("../experiments/records")
chosen = ("variant", "seeds", "mean loss", "difference", "t interval", "max gain backward", "verdict")
variants = [s for s in group(read_newest(RECORDS, "connections")) if s.kind != "residual"]
first = [variant.any_run for variant in variants]
means = [mean_record(variant) for variant in variants]

# %% [markdown]
# ## Mixing matrices and their composite

# %%
display(plots.h_res(first))

# %% [markdown]
# *H_res at five depths and the composite of all; row sums at the right, column sums below. With `init=paper` and with
# `init=home`, the row sums of mHC are 1. HC's are not, and they compound.*

# %%
display(plots.mixing(means))

# %% [markdown]
# *Distance of row and column sums from 1, entropy of rows (0: each stream keeps to itself), and distance of the
# composite to uniform averaging, which products of doubly stochastic matrices approach.*

# %%
display(plots.eigenvalues(means))

# %% [markdown]
# *|lambda_2| / |lambda_1|. Where that of the composite is near 0, mixing alone would make all streams multiples of one
# vector (under mHC with any `init=`, equal streams), and only the writes keep them apart.*
#
# ## Specialisation: who reads and writes which stream

# %%
display(plots.reads_and_writes(first))

# %% [markdown]
# *H_pre and H_post over depth. The diagonals are the home streams of the initial values: stream $1 + (l - 1) \bmod n$ of
# sub-layer $l$, where streams count from 1. A column of one colour treats all streams alike.*

# %%
lines = ["| | share of the most-read stream in H_pre | of the most-written in H_post |", "| --- | --- | --- |"]
for variant in variants:
    shares = []
    for key in ("h_pre", "h_post"):
        coefficients = [np.abs(last_diagnostics(run, key)[1]) for run in variant.runs.values()]
        shares.append(np.mean([(c.max(1) / c.sum(1)).mean() for c in coefficients]))
    lines.append(f"| {variant.label} | {shares[0]:.2f} | {shares[1]:.2f} |")
display(Markdown("\n".join([*lines, "", "Means over sub-layers and seeds; 1/n = 0.25 is uniform, 1 a single stream."])))

# %% [markdown]
# ## Collapse: have the streams become one vector?

# %%
display(plots.stream_similarity(means))

# %% [markdown]
# *Cosine between pairs of streams, absolute (thick) and signed (thin), and the participation ratio of their Gram matrix,
# over depth and over steps. An absolute cosine of 1 means that the streams of a token are one vector up to sign and
# scale; then H_res changes only their signs and scales. A ratio of 1 means the same, or that one stream outweighs the
# others; n means orthogonal streams of equal norm. The signed cosine alone does not show collapse, because opposite
# streams cancel in it.*


# %%
def stream_cells(variant):
    """Return the measures at the end of training, means over sub-layers and seeds; a dash where the runs have none."""
    values = [variant.mean(f"final_{key}") for key in STREAM_MEASURES]
    cells = [Cell("–" if value is None else f"{value:.3f}", value) for value in values]
    return dict(zip(("signed cosine", "absolute cosine", "rank"), cells, strict=True))


table = [{"variant": Cell(variant.label, variant.label)} | stream_cells(variant) for variant in variants]
display(Markdown(markdown_table(table)))

# %% [markdown]
# *The measures after the last step, means over sub-layers and seeds. Rank is the participation ratio.*

# %%
display(plots.stream_size(means))

# %% [markdown]
# *Root mean square of streams (band: smallest to largest stream) and of branch outputs.*
#
# ## Is H_res needed?
#
# The sweep `mixing` compares kinds that differ in H_res alone, from the identity (`identity`) to exact and approximate
# doubly stochastic matrices.

# %%
kinds = group(read_newest(RECORDS, "mixing"))
display(SWEEP_FIGURES["seed_strip"].draw(kinds))
display(Markdown(markdown_table([{key: row[key] for key in chosen} for row in statistics_rows(kinds)])))

# %% [markdown]
# *Validation loss of every run in nats per token. The grey band is residual's mean plus and minus one standard deviation
# over seeds.*
#
# The paper's ablation at 27B has these final losses minus residual's: H_res alone -0.022, with H_pre -0.025, all three
# -0.027. The same ablation at this size:

# %%
parts = group(read_newest(RECORDS, "components"))
table = [{key: row[key] for key in chosen} for row in statistics_rows(parts)]
display(Markdown(markdown_table([row | stream_cells(part) for row, part in zip(table, parts, strict=True)])))

# %% [markdown]
# *The sweep `components`: mHC from `init=home` with some coefficients at fixed values; `disable=` names those that are
# fixed. Without H_post every stream is written alike. Equal streams have a signed cosine of 1, and an H_res with unit row
# sums does not change them.*
#
# ## Initial values decide about collapse
#
# Equal streams that are read and written alike stay equal, whatever H_res is. The preset `home` breaks this symmetry and
# keeps the streams apart.

# %%
presets = group(read_newest(RECORDS, "presets"))
rows = {row["variant"].text: row for row in statistics_rows(presets)}
table = []
for variant in presets:
    if variant.kind == "mhc":
        loss = rows[variant.label]["mean loss"]
        table.append({"variant": Cell(variant.label, variant.label), **stream_cells(variant), "loss": loss})
display(Markdown(markdown_table(table)))

# %% [markdown]
# *The sweep `presets`: presets (`init=`) of mHC's static part, three seeds, with the measures above and the validation
# loss in nats per token.*
