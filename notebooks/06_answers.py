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
# Which map carries the gain of mHC (init=paper)? Is a learned H_res needed once streams differ? Does the margin in learning rate
# survive Muon?
# Each question has a sweep file whose docstring says how it is decided. The file was committed before the first run.
# [docs/answers.md](../docs/answers.md) says what was seen and what was not.
#
# The next cell has the one path to set: the folder with `records` and `sweeps`. Records of your own runs of the same sweeps give
# the same figures and tables.

# %%
EXPERIMENTS = "../experiments"

# %%
# %matplotlib inline
from IPython.display import Markdown, display

from mhc_jax.plots import NARROW, drawn_at
from mhc_jax.reports.questions import questions

found = questions(EXPERIMENTS)
display(found["which_map"].draw())

# %% [markdown]
# *Question 1. Change of the validation loss (nats a byte, below 0 is better) when a map is learned. Thick lines are the tests of
# the two rules: the mean of the four designs of which_map, whose streams stay nearly one vector, and which_map_home, whose
# streams differ. Thin lines are single designs; dots are seeds; lines are 95 % intervals, not corrected for their number.*

# %%
display(found["mixing_needed"].draw())

# %% [markdown]
# *Question 2. Loss of each form of H_res minus that of mHC, where streams differ (all have init=home). Thick lines are the tests
# that decide, and thin lines are single combinations. Dots are seeds; lines are 95 % intervals. The grey band is the margin of
# equivalence, 0.005 nats.*

# %%
with drawn_at(NARROW):  # one panel below the other
    figure = found["muon_margin"].draw()
display(figure)

# %% [markdown]
# *Question 3. Largest stable learning rate of each connection under AdamW, Muon, and Muon with the connections under AdamW. Marks
# are seeds, and bars are geometric means. Full marks are with clipping, hollow ones without. A triangle is a bound. Residual in
# the third panel is that of the second.*
#
# ## The tables
#
# Every test of every question, primary and secondary. `python experiments/answers.py` writes the same tables to
# experiments/records/ANSWERS.md.

# %%
display(Markdown(found["which_map"].text))

# %%
display(Markdown(found["mixing_needed"].text))

# %%
display(Markdown(found["muon_margin"].text))
