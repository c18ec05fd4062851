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
# figures show the sweep `connections` after the last step: matrices and what is computed of them seed 0, other curves the
# mean of three seeds. Matrices are means over tokens.
#
# The next cell has the one path to set: `RUNS` may be your own sweep, a folder of runs, or one run. Figures and tables of
# the first three sections are then those of your runs, while the words between them describe the record that is named
# there now.

# %%
from mhc_jax.reports.record import newest_record

RECORDS = "../experiments/records"
RUNS = newest_record(RECORDS, "connections")  # or your own, such as "../runs/demo"

# %%
# %matplotlib inline
import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Markdown, display

from mhc_jax import plots
from mhc_jax.analysis import streams
from mhc_jax.analysis.comparison import Cell, statistics_rows
from mhc_jax.analysis.run_reader import last_diagnostics
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec
from mhc_jax.data import load_data
from mhc_jax.diagnostics import STREAM_MEASURES
from mhc_jax.loop import train
from mhc_jax.reports.figures import figure_of, read_variants
from mhc_jax.reports.markup import markdown_table
from mhc_jax.runs.trained import load_trained
from mhc_jax.sweeps.grid import over, plan

TINY = os.environ.get("MHC_JAX_TINY") == "1"  # shrinks the live runs, for tests
chosen = ("variant", "seeds", "mean loss", "difference", "t interval", "max gain backward", "verdict")
variants = [variant for variant in read_variants(RUNS) if variant.kind != "residual"]

# %% [markdown]
# ## Mixing matrices and their composite

# %%
display(figure_of("h_res", variants))

# %% [markdown]
# *H_res of the first, the middle and the last sub-layer, and the composites of the first half, of the second half and of
# all; row sums (forward) at the right, column sums (backward) below. With `init=paper` and with `init=home`, the row sums
# of mHC are 1. HC's are not, and they compound.*

# %%
display(figure_of("mixing", variants))

# %% [markdown]
# *Distance of row and column sums from 1, entropy of rows (0: each stream keeps to itself), and distance of the
# composite to uniform averaging, which products of doubly stochastic matrices approach.*

# %%
display(figure_of("eigenvalues", variants))

# %% [markdown]
# *|lambda_2| / |lambda_1|. Where that of the composite is near 0, mixing alone would make all streams multiples of one
# vector (under mHC with any `init=`, equal streams), and only the writes keep them apart.*
#
# ## Specialisation: who reads and writes which stream

# %%
display(figure_of("reads_and_writes", variants))

# %% [markdown]
# *H_pre and H_post over depth. The diagonals are the home streams of the initial values: stream $1 + (l - 1) \bmod n$ of
# sub-layer $l$, where streams count from 1. A column of one colour treats all streams alike.*

# %%
lines = ["| | share of the most-read stream in H_pre | of the most-written in H_post |", "| --- | --- | --- |"]
for variant in variants:
    shares = []
    for key in ("h_pre", "h_post"):
        lasts = [last_diagnostics(run, key) for run in variant.runs.values()]
        coefficients = [np.abs(last[1]) for last in lasts if last is not None]
        shares.append(np.mean([(c.max(1) / c.sum(1)).mean() for c in coefficients]) if coefficients else np.nan)
    lines.append(f"| {variant.label} | {shares[0]:.2f} | {shares[1]:.2f} |")
display(Markdown("\n".join([*lines, "", "Means over sub-layers and seeds; 1/n = 0.25 is uniform, 1 a single stream."])))

# %% [markdown]
# ## Collapse: have the streams become one vector?

# %%
display(figure_of("stream_similarity", variants))

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
display(figure_of("stream_size", variants))

# %% [markdown]
# *Root mean square of streams (band: smallest to largest stream) and of branch outputs.*
#
# ## Is H_res needed?
#
# The sweep `mixing` compares kinds that differ in H_res alone, from the identity (`identity`) to exact and approximate
# doubly stochastic matrices.

# %%
kinds = read_variants(newest_record(RECORDS, "mixing"))
display(figure_of("seed_strip", kinds))
display(Markdown(markdown_table([{key: row[key] for key in chosen} for row in statistics_rows(kinds)])))

# %% [markdown]
# *Validation loss of every run in nats per token. The grey band is residual's mean plus and minus one standard deviation
# over seeds.*
#
# The paper's ablation at 27B has these final losses minus residual's: H_res alone -0.022, with H_pre -0.025, all three
# -0.027. The same ablation at this size:

# %%
parts = read_variants(newest_record(RECORDS, "components"))
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
presets = read_variants(newest_record(RECORDS, "presets"))
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
#
# ## Looking inside: three short runs of this notebook
#
# HC and mHC with two presets, each with 4 blocks (8 sub-layers) of width 48 and n = 4, are trained for 120 steps on the
# bytes of Shakespeare, seed 0. `mhc_jax.analysis.streams` then looks inside (`docs/looking_inside.md`). All figures
# below show these three models at the same held-out text: 16 sequences of 49 bytes, 768 of which are predicted. No other
# seed was tried.

# %%
layers, steps = (1, 3) if TINY else (4, 120)
base = ExperimentConfig(
    model=ModelConfig(width=48, num_layers=layers, num_heads=4, num_kv_heads=4, mlp_width=128),
    data=DataConfig(source="shakespeare", sequence_length=48, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=steps // 4),
    train=TrainConfig(steps=steps, validate_every=0, validation_batches=4, checkpoint_every=0, diagnostics_every=0),
)
data, models = load_data(base.data), {}
inputs, last = zip(*((b["inputs"], b["targets"][:, -1:]) for b in data.validation_batches(2)), strict=True)
tokens = np.concatenate([np.concatenate(inputs), np.concatenate(last)], 1)
with tempfile.TemporaryDirectory() as scratch:
    for run in plan(to_mapping(base), over("connection", ["hc", "mhc:init=paper", "mhc:init=home"])):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(run.config, Path(scratch) / run.name, data=data)
        models[spec(run.config.model.connection)] = load_trained(Path(scratch) / run.name)

# %% [markdown]
# ### Ablation: the loss without a stream

# %%
ways = ("zero", "mean")
lost = {label: {by: streams.ablate(m, tokens, by).mean((1, 2)) for by in ways} for label, m in models.items()}
display(plots.stream_ablation(lost))

# %% [markdown]
# *By how much the mean loss grows if one stream is replaced at every sub-layer and at the exit. Left: by zero. Right: by
# its mean over the tokens. A stream that can be replaced without a loss may be unused, or a copy of another one. Here HC
# misses streams 1 and 2 most, and mHC with `init=home` misses stream 2. With `init=paper` no stream is missed at zero, and
# streams 1 and 2 are at their means.*
#
# ### Rescue: what one clean stream brings back

# %%
rescued = {label: streams.rescue(m, tokens, "mean") for label, m in models.items()}
display(plots.stream_rescue(rescued))
lines = ["| | loss | loss with all streams at their means at sub-layer 1 |", "| --- | --- | --- |"]
lines += [f"| {label} | {found.clean:.3f} | {found.corrupted:.3f} |" for label, found in rescued.items()]
display(Markdown("\n".join(lines)))

# %% [markdown]
# *All streams that enter sub-layer 1 are replaced by their means over the tokens, so that the model does not know what
# it reads. Then one stream gets its values from the unchanged run, at one sub-layer alone. Colours show the share of the
# loss difference (the table, in nats per token) that comes back. Shares of a column need not sum to 1. With `init=home`
# stream 2 brings back the most at every sub-layer. With `init=paper` stream 1, which sub-layer 1 reads, does so at
# sub-layer 1, and from sub-layer 3 on no stream brings back half of it. Under HC streams 3 and 4 bring back the most at
# sub-layer 1, where stream 1 alone makes the loss larger (blue), and from sub-layer 3 on no stream brings back much more
# than half.*
#
# ### Logit lens: what a stream predicts by itself

# %%
lenses = {label: streams.logit_lens(m, tokens) for label, m in models.items()}
display(plots.stream_lens(lenses))

# %% [markdown]
# *Mean loss if the final norm and the unembedding are applied to one stream, or to all streams as the exit collapses
# them (grey), before each sub-layer and at the exit. The last grey value is the loss of the model. The curves of the
# streams nearly coincide for HC and for mHC with `init=paper`. With `init=home` they differ, and from sub-layer 4 on the
# collapsed streams predict better than any one stream.*
#
# ### Dominant stream: which one is the largest

# %%
display(plots.stream_dominance({label: streams.dominant_share(m, tokens) for label, m in models.items()}))

# %% [markdown]
# *Share of the tokens whose largest stream, by its norm, is stream i; equal streams count in equal parts, as at the entry
# (sub-layer 1). The lowest panel shows the mean share of the largest stream in the squared norm of all four. Near the
# grey line, 1/4, the streams have nearly equal norms, and the map above says little: so it is for HC and for mHC with
# `init=paper`. With `init=home` stream 2 is the largest for most tokens from sub-layer 3 on.*
