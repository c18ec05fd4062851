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
# # Gain curves: HC against mHC (mHC, Figures 3 and 7)
#
# A connection mixes the streams by $x_{l+1} = H^{res}_l x_l + (H^{post}_l)^T F(H^{pre}_l x_l)$ (mHC Eq. 3). Depth acts on a
# signal through the composite $P = H^{res}_L \cdots H^{res}_l$ (mHC Eq. 4). Its *forward gain* is
# $\max_i |\sum_j P_{ij}|$ and its *backward gain* $\max_j |\sum_i P_{ij}|$ (mHC section 3.1). Attention and feed-forward
# are separate sub-layers. Gains are computed per token, then averaged over tokens.
#
# The next cell has nothing to do where mhc_jax can be imported. Elsewhere, as on Colab, write the address of this
# repository into it: the cell then installs the package from there. The cell after it has the one path to set: `RUNS` may
# be your own sweep, a folder of runs, or one run. Figures and tables below are then those of your runs, while the words
# between them describe the record that is named there now.

# %%
import importlib.util
import os
import subprocess
import sys

REPOSITORY = ""
if importlib.util.find_spec("mhc_jax") is None:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "mhc_jax"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./mhc_jax"], check=True)
    os.chdir("mhc_jax/notebooks")

# %%
from mhc_jax.reports.record import newest_record

RECORDS = "../experiments/records"
RUNS = newest_record(RECORDS, "connections")  # or your own, such as "../runs/demo"

# %%
# %matplotlib inline
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
from IPython.display import Markdown, display

from mhc_jax.analysis.run_reader import last_diagnostics, read_run
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.data import load_data
from mhc_jax.diagnostics import summarize
from mhc_jax.loop import train
from mhc_jax.reports.figures import figure_of, read_variants
from mhc_jax.runs.checkpoint import load_params
from mhc_jax.sweeps.grid import over, plan
from mhc_jax.train_step import make_diagnostics_step

TINY = os.environ.get("MHC_JAX_TINY") == "1"  # shrinks the live run, for tests

# %% [markdown]
# ## From stored runs
#
# The sweep `connections` has 8 blocks (16 sub-layers) of width 96, n = 4, 400 steps and three seeds. Lines are means over
# seeds.

# %%
variants = read_variants(RUNS)
several = [variant for variant in variants if variant.kind != "residual"]
display(figure_of("gain_depth", several))

# %% [markdown]
# *Gains of single mixing matrices and of composites after the last step. On the left all runs share a logarithmic axis; on
# the right those near 1 have linear axes of their own. HC's composites grow with depth in both directions. mHC's forward
# gain is 1 up to rounding with either `init=`, because Sinkhorn ends on rows (mHC Eq. 9). Its backward gain comes from
# the column sums, which 20 iterations leave a little off 1. The band reaches up to the token of the largest gain.*

# %%
display(figure_of("gain_step", several))

# %% [markdown]
# *Gain of the whole composite against optimizer steps, mean over seeds. HC starts at the identity (gain 1), leaves it
# while the learning rate is high, and returns part of the way as the rate decays.*
#
# ## The paper's numbers beside ours

# %%
lines = ["| | largest composite gain, forward | backward |", "| --- | --- | --- |"]
lines += ["| HC, 27B (mHC Figure 3) | larger of the two: near 3000 | |"]
lines += ["| mHC, 27B, `init=paper` (mHC Figure 7) | larger of the two: near 1.6 | |"]
for variant in variants:
    if variant.kind != "residual":
        sides = [variant.results(f"max_composite_{side}").values() for side in ("forward", "backward")]
        cells = [f"{np.mean(list(v)):.4g} ({min(v):.4g} to {max(v):.4g})" if v else "–" for v in sides]
        lines.append(f"| {variant.label}, here: mean of {len(variant.runs)} seeds (range) | {' | '.join(cells)} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# Why they differ:
#
# - *Depth.* 27B has 60 sub-layers, this record 16, and a product compounds over them (see the sweep `depth` below).
# - *Steps and learning rate.* Each entry of $H^{res}$ moves by up to the learning rate a step (Adam). Ours has 400
#   steps; the paper's 50,000.
# - *mHC's 1.6* is due to the truncation of Sinkhorn's iterations. Logits that spread widely leave column sums off 1;
#   short runs keep them close together.
# - *Averaging.* We multiply per token and average the gains. The product of averaged matrices has a smaller gain
#   (`composite_mean_*`).
# - `make demo` (32 sub-layers, learning rate 7e-3) reaches the paper's order of magnitude for HC (README).

# %%
display(figure_of("swept", read_variants(newest_record(RECORDS, "depth"))))

# %% [markdown]
# *The sweep `depth`: loss and largest composite gains against the number of blocks, of two sub-layers each. Dots are the
# three seeds, lines their means. mHC has `init=home`.*
#
# ## Live: a run of this notebook
#
# Twelve blocks of width 48 on the bytes of Shakespeare, at a learning rate of 1e-2. There HC's composite gain grows
# within 60 steps.

# %%
layers, steps = (2, 4) if TINY else (12, 60)
base = ExperimentConfig(
    model=ModelConfig(width=48, num_layers=layers, num_heads=4, num_kv_heads=4, mlp_width=128, depth_scaled_init=False),
    data=DataConfig(source="shakespeare", sequence_length=48, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=steps // 4),
    train=TrainConfig(
        steps=steps,
        log_every=1,
        validate_every=0,
        validation_batches=4,
        checkpoint_every=0,
        diagnostics_every=steps // 4,
    ),
)
scratch = tempfile.TemporaryDirectory()
live = plan(to_mapping(base), over("connection", ["hc", "mhc:init=home"]))
data = load_data(base.data)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for run in live:
        train(run.config, Path(scratch.name) / run.name, data=data)
display(figure_of("gain_depth", read_variants(scratch.name)))

# %% [markdown]
# *The same panels for the live run. The order of magnitude of HC's composite gain depends on learning rate, steps
# and depth.*
#
# ## From a checkpoint
#
# The last checkpoint, loaded anew, has the gains on the diagnostics tokens that the run wrote to metrics.jsonl.

# %%
mapping, params = load_params(Path(scratch.name) / "hc")
config = from_mapping(mapping)
tokens = data.validation_batches(1)[0]["inputs"][:1]
gains = summarize(make_diagnostics_step(config)(params, tokens))["composite_forward"]
_, logged = last_diagnostics(read_run(Path(scratch.name) / "hc"), "composite_forward")
np.testing.assert_allclose(gains, logged, rtol=1e-3)
print(
    f"HC after {steps} steps, composite forward gain over {len(gains)} sub-layers: {gains[-1]:.2f} from the checkpoint,"
)
print(f"{logged[-1]:.2f} in metrics.jsonl.")
scratch.cleanup()
