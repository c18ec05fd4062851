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
# # Three questions, and what small runs answer
#
# Which map carries mHC's gain? Is a learned H_res needed once streams differ? Does mHC's margin in learning rate survive Muon?
# Each question has a sweep file whose docstring says how it is decided, and which was committed before the first run.
# [docs/answers.md](../docs/answers.md) says what was seen and what was not.

# %%
# %matplotlib inline
import runpy
from pathlib import Path

from IPython.display import Markdown, display

from mhc_jax.analysis import answers
from mhc_jax.plots import answers as figures
from mhc_jax.reports import answers as tables
from mhc_jax.reports.record import newest_record, read_newest, read_record

RECORDS = Path("../experiments/records")
SWEEPS = Path("../experiments/sweeps")

maps = read_newest(RECORDS, "which_map")
display(figures.which_map_figure(answers.which_map(maps)))

# %% [markdown]
# *Question 1. Change of the validation loss (nats a byte, below 0 is better) when a map is learned. Thick lines are the three tests
# that decide; dots are seeds, lines Student's 95 % intervals.*

# %%
mixing = read_newest(RECORDS, "mixing_needed")
display(figures.mixing_needed_figure(answers.mixing_needed(mixing)))

# %% [markdown]
# *Question 2. Loss of each form of H_res minus that of mHC, where streams differ. Thick lines are the tests that decide, and the
# grey band is the margin of equivalence, 0.005 nats.*

# %%
rule = runpy.run_path(str(SWEEPS / "muon_margin.py"))
margin = read_newest(RECORDS, "muon_margin")
display(figures.muon_margin_figure(answers.muon_margin(margin, rule["LOSS_BELOW"], rule["RATES"][0])))

# %% [markdown]
# *Question 3. Largest stable learning rate of each connection under AdamW, Muon, and Muon with the connections under AdamW. Dots
# are seeds, bars geometric means; hollow without clipping.*
#
# ## The tables
#
# Every test of every question, primary and secondary. `python experiments/answers.py` writes the same tables to
# experiments/records/ANSWERS.md.


# %%
def runs_of(name):
    """The runs of the newest record of a sweep, or none."""
    folder = newest_record(RECORDS, name)
    return read_record(folder) if folder else []


larger = runs_of("which_map_large")
display(Markdown(tables.which_map_part(maps, larger, [], {})))

# %%
display(Markdown(tables.mixing_needed_part(mixing, {}, [], {})))

# %%
display(Markdown(tables.muon_margin_part(margin, rule["LOSS_BELOW"], rule["RATES"][0], runs_of("muon_rates"))))
