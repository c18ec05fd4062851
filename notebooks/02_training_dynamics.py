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
# # Training dynamics: loss, gap to residual, gradient norm, spikes (mHC, Figures 2 and 5)
#
# The sweep `connections` compares residual, HC and mHC, with three seeds each. Runs of one seed share data order,
# schedule and the initial values of the branches, so that they differ in the connection alone. Loss is the mean
# cross-entropy in nats per token; a token is a byte here.

# %%
# %matplotlib inline
from pathlib import Path

from IPython.display import Markdown, display

from mhc_jax import plots
from mhc_jax.analysis.comparison import findings, statistics_rows
from mhc_jax.analysis.grouping import group, mean_record
from mhc_jax.analysis.run_reader import seed_name
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.record import read_newest

RECORDS = Path("../experiments/records")
variants = group(read_newest(RECORDS, "connections"))
variants.sort(key=lambda variant: (("residual", "hc", "mhc").index(variant.kind), variant.label))

# %%
display(SWEEP_FIGURES["seed_bands"].draw(variants))

# %% [markdown]
# *Left: training loss without the first quarter; right: global gradient norm before clipping (at 1). Lines are means of
# three seeds, bands reach from the lowest seed to the highest. Triangles mark loss spikes (0.5 nats above the median of
# the last 50 steps).*

# %%
display(SWEEP_FIGURES["gap_curves"].draw(variants))

# %% [markdown]
# *Training loss minus the loss of the residual run of the same seed on the same batch. Below zero the connection is
# better. Thin lines are seeds; their spread shows how little one seed says.*

# %%
display(plots.loss([mean_record(variant) for variant in variants]))

# %% [markdown]
# *Means over seeds of the whole run and of its second half, with validation losses as markers.*
#
# ## Spikes and final losses

# %%
for variant in variants:
    for seed, run in variant.runs.items():
        spikes = ", ".join(map(str, run.spike_steps)) or "none"
        print(
            f"{variant.label:14s} {seed_name(seed)}: validation loss {run.result('validation_loss'):.4f}, spikes at {spikes}"
        )
display(SWEEP_FIGURES["seed_strip"].draw(variants))

# %% [markdown]
# *Validation loss of every run. The grey band is residual's mean plus and minus one standard deviation over seeds.*

# %%
chosen = (
    "variant",
    "seeds",
    "mean loss",
    "st. dev.",
    "difference",
    "t interval",
    "p (t)",
    "p (sign flip)",
    "spikes",
    "verdict",
)
display(Markdown(markdown_table([{key: row[key] for key in chosen} for row in statistics_rows(variants)])))
display(Markdown("\n".join(f"- {sentence}" for sentence in findings(variants))))

# %% [markdown]
# The paper's 27B mHC ends 0.021 nats below residual, and HC's loss surges near step 12,000. A run of 400 steps at 1M
# parameters tests neither. At this size the learning rate decides whether HC breaks:

# %%
rates = group(read_newest(RECORDS, "learning_rate"))
display(SWEEP_FIGURES["frontier"].draw(rates))
display(SWEEP_FIGURES["swept"].draw(rates))

# %% [markdown]
# *The sweep `learning_rate` (embeddings of standard deviation 1, no clipping). Top: the learning rates at which each
# connection is stable; bottom: loss and largest composite gains.*
