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
# # Scaling: the number of streams, and compute
#
# mHC can grow in two ways: in n, which costs memory and traffic but next to no arithmetic, and in the size of the model.
# The records of the sweeps `width` and `ladder` show both.
#
# The next cell has the one path to set: `RUNS` may be your own sweep or a folder of runs. All sections then show it, and
# each says what your runs lack for its figure. Empty, each section shows the record of its own sweep, which the words
# describe.

# %%
RECORDS = "../experiments/records"
RUNS = ""  # or your own, such as "../runs/width"

# %%
# %matplotlib inline
from IPython.display import Markdown, display

from mhc_jax.analysis.comparison import findings, statistics_rows
from mhc_jax.analysis.statistics import power_law
from mhc_jax.reports.figures import figure_of, read_variants
from mhc_jax.reports.markup import markdown_table
from mhc_jax.reports.record import newest_record

chosen = (
    "variant",
    "seeds",
    "mean loss",
    "st. dev.",
    "difference",
    "t interval",
    "max gain forward",
    "max gain backward",
    "verdict",
)

# %% [markdown]
# ## Number of streams

# %%
widths = read_variants(RUNS or newest_record(RECORDS, "width"))
display(figure_of("swept", widths))
display(Markdown(markdown_table([{key: row[key] for key in chosen} for row in statistics_rows(widths)])))
display(Markdown("\n".join(f"- {sentence}" for sentence in findings(widths))))

# %% [markdown]
# *Validation loss (nats per token) and largest composite gains against n; dots are seeds, lines their means. In HC's
# paper the loss falls up to n = 4 and hardly further at n = 8 (OLMo-1B, 500B tokens: validation loss 2.819, 2.802,
# 2.781, 2.778 for n = 1, 2, 4, 8; residual 2.811).*
#
# ## Compute ladder
#
# Loss against training FLOPs x for four sizes. The fit is $\text{loss} = a (x/x_0)^{-b}$ on logarithms, with $x_0$ the
# geometric mean of the x. Four points of one seed decide nothing about exponents, as the intervals show.

# %%
sizes = read_variants(RUNS or newest_record(RECORDS, "ladder"))
display(figure_of("ladder", sizes))
lines = ["| connection | loss at x_0 (nats per token) | exponent b | 95 % interval |", "| --- | --- | --- | --- |"]
for name in dict.fromkeys(variant.any_run.connection for variant in sizes):
    runs = [run for variant in sizes if variant.any_run.connection == name for run in variant.finished]
    x = [run.result("flops_per_token") * run.tokens for run in runs]
    if len(set(x)) < 2:
        continue
    fit = power_law(x, [run.result("validation_loss") for run in runs])
    interval = "none" if fit.b_interval is None else f"{fit.b_interval[0]:.3f} to {fit.b_interval[1]:.3f}"
    lines.append(f"| {name} | {fit.a:.4f} | {fit.b:.3f} | {interval} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# *Dots are runs, lines the fits. The paper's ladder (3B, 9B, 27B, each with its compute-optimal tokens) reports that
# mHC keeps its advantage, a little smaller at the largest size.*
#
# ## Sinkhorn iterations
#
# How many iterations does the projection need? The error of the column sums compounds to the composite backward gain.

# %%
display(figure_of("swept", read_variants(RUNS or newest_record(RECORDS, "sinkhorn"))))

# %% [markdown]
# *Loss and largest composite gains against the number of iterations, t_max (learning rate 1e-2, no warm-up). The forward
# gain is 1 throughout, since Sinkhorn ends on rows.*
