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
# # Cost: traffic, memory, time (mHC Tables 2 and 3, Eq. 20)
#
# With n streams, n times the residual stream is read and written around every branch. Elements are counted per token and
# sub-layer in the forward pass, without the branch F.
#
# The next cell has the one path to set: `RUNS` may be your own sweep or a folder of runs with a residual one. The section
# "Cost in this project" then has their ratios, while its words describe the record that is named there now.

# %%
from mhc_jax.reports.record import newest_record

RECORDS = "../experiments/records"
RUNS = newest_record(RECORDS, "connections")  # or your own, such as "../runs/demo"

# %%
# %matplotlib inline
import json
from pathlib import Path

from IPython.display import Markdown, display

from mhc_jax.analysis.grouping import mean_record
from mhc_jax.cost import memory_io
from mhc_jax.plots import cost
from mhc_jax.reports.figures import read_variants

n, C = 4, 2560  # mHC's 27B model

# %% [markdown]
# ## Traffic

# %%
lines = [f"| operation (n = {n}) | read (C) | written (C) |", "| --- | --- | --- |"]
table = memory_io.unfused(n, C)
table |= {"**total, unfused**": memory_io.total(table)}
table |= {
    "**total, H_post, H_res and merge fused**": memory_io.total(memory_io.merged(n, C)),
    "residual": memory_io.residual(C),
}
lines += [f"| {name} | {moved.read / C:.2f} | {moved.written / C:.2f} |" for name, moved in table.items()]
display(Markdown("\n".join(lines)))
display(cost.traffic_bars(n, C))

# %% [markdown]
# *Operation by operation, 34C elements are moved (mHC Table 2), and 2C more for the pre-norm. One pass moves 10C, the
# least possible, (2n + 2)C. The totals in grey include the pre-norm and leave the coefficients out.*
#
# ## Memory against L_r
#
# The streams x are stored at every $L_r$-th sub-layer. The connections in between are computed again from them; F is not.
# This keeps $nC\lceil L/L_r\rceil + (n+2)C L_r$ elements per token (mHC Eq. 20), least near $L_r = \sqrt{nL/(n+2)}$.

# %%
display(cost.recompute(60, (2, 4, 8), C))

# %% [markdown]
# *The 27B model (60 sub-layers, bfloat16). Dots are the best L_r. At the left end x is stored at every sub-layer, at the
# right end once.*
#
# ## Cost in this project
#
# The sweep `connections` (width 96, n = 4) gives ratios to residual of parameters, FLOPs of a train step, and memory of
# the compiled step.

# %%
results = {variant.label: mean_record(variant) for variant in read_variants(RUNS)}
base = next(run for run in results.values() if run.kind == "residual")
shown = [label for label in ("hc", "mhc:init=home") if label in results]
shown = shown or [label for label, run in results.items() if run is not base]
measures = {"parameters": "parameters", "train FLOPs": "flops_per_token", "compiled memory": "peak_memory_bytes"}
ratios = {
    name: {label: results[label].result(key) / base.result(key) for label in shown if results[label].result(key)}
    for name, key in measures.items()
}
# Medians of three runs of `experiments/steptime.py`: width 64, 16 blocks, 2 cores, nothing else running; commit 2ba8085.
ratios |= {"step time\n(width 64, CPU)": dict(zip(("hc", "mhc:init=home"), (1.39, 1.44), strict=True))}
display(cost.overhead(ratios))

# %% [markdown]
# *Ratios to residual. The last group is measured (README, Cost, and `experiments/LOG.md`). At a small width connections
# look expensive, because their arithmetic grows with nC and that of the branches with C squared. mHC's paper reports
# +6.7 % training time at 27B.*
#
# ## Kernels against the copy bandwidth
#
# On a GPU or TPU, `python experiments/device_report.py` times every operation and writes
# `experiments/records/<date>-device-<name>/report.json`.

# %%
reports = sorted(Path(RECORDS).glob("*-device-*/report.json"))
if not reports:
    display(
        Markdown(
            "There is no device record yet; run `python experiments/device_report.py` on a machine with a GPU or TPU."
        )
    )
for path in reports:
    display(Markdown(f"`{path.parent.name}`"), cost.roofline(json.loads(path.read_text())))

# %% [markdown]
# *With a record, a figure here shows the bytes that must move over the time taken, as a share of the rate of a plain copy.
# 100 % is the roofline of operations that do next to no arithmetic.*
