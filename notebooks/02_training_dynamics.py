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
#
# The next cell has the one path to set: `RUNS` may be your own sweep, a folder of runs, or one run. Figures and tables
# are then those of your runs, while the words between them describe the record that is named there now.

# %%
from mhc_jax.reports.record import newest_record

RECORDS = "../experiments/records"
RUNS = newest_record(RECORDS, "connections")  # or your own, such as "../runs/demo"

# %%
# %matplotlib inline
from IPython.display import Markdown, display

from mhc_jax.analysis.comparison import findings, statistics_rows
from mhc_jax.analysis.run_reader import seed_name
from mhc_jax.reports.figures import figure_of, read_variants
from mhc_jax.reports.markup import markdown_table

first = ("residual", "hc", "mhc")  # other kinds follow
variants = read_variants(RUNS)
variants.sort(key=lambda variant: ([*first, variant.kind].index(variant.kind), variant.label))

# %%
display(figure_of("seed_bands", variants))

# %% [markdown]
# *Training loss without the first quarter of the steps, and global gradient norm before clipping (at 1). Lines are means
# of three seeds, bands reach from the lowest seed to the highest. Triangles mark loss spikes (0.5 nats above the median
# of the last 50 steps).*

# %%
display(figure_of("gap_curves", variants))

# %% [markdown]
# *Training loss minus the loss of the residual run of the same seed on the same batch. Below zero the connection is
# better. Thin lines are seeds; their spread shows how little one seed says.*

# %%
display(figure_of("loss", variants))

# %% [markdown]
# *Means over seeds of the whole run and of its second half, with validation losses as markers.*
#
# ## Spikes and final losses

# %%
for variant in variants:
    for seed, run in variant.runs.items():
        spikes = ", ".join(map(str, run.spike_steps)) or "none"
        loss = run.result("validation_loss")
        ended = f"validation loss {loss:.4f}" if loss is not None else run.status
        print(f"{variant.label:14s} {seed_name(seed)}: {ended}, spikes at {spikes}")
display(figure_of("seed_strip", variants))

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
rates = read_variants(newest_record(RECORDS, "learning_rate"))
display(figure_of("frontier", rates))
display(figure_of("swept", rates))

# %% [markdown]
# *The sweep `learning_rate` (embeddings of standard deviation 1, no clipping). Top: the learning rates at which each
# connection is stable; bottom: loss and largest composite gains, those near 1 with axes of their own.*
