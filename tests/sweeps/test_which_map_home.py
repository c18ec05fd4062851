"""The functions of experiments/sweeps/which_map_home.py freeze the maps that they say, and no others."""

import dataclasses
import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_runs import ROOT

from mhc_jax.connections import connection_module
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.optim import optimizer
from mhc_jax.sweeps.grid import load_sweep
from mhc_jax.train_step import init_state

SWEEP = ROOT / "experiments" / "sweeps" / "which_map_home.py"
HOME = runpy.run_path(str(SWEEP))
MAPS = {"pre": (0, range(4)), "post": (1, range(4, 8)), "res": (2, range(8, 24))}
"""Map -> its entry of alpha, and its columns of phi, for four streams in the order of the paper."""


@functools.cache
def configs():
    """Return the configuration of each optimizer of the sweep, with one block."""
    runs = [run for run in load_sweep(SWEEP).runs if run.config.train.seed == 0]
    one = lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, num_layers=1, vocab_size=256))  # noqa: E731
    return {run.config.optimizer.name.split(":")[1]: one(run.config) for run in runs}


@functools.cache
def start():
    params = init_state(configs()["learn_none"]).params
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}, params


@pytest.mark.parametrize("learned", HOME["SUBSETS"], ids=HOME["name"])
def test_only_the_maps_that_are_learned_move(learned, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configs()[HOME["name"](learned)]
    before, params = start()
    tx = optimizer(config.optimizer, config.train.steps, connection_module(config.model.connection))
    state, after = tx.init(params), params
    for _ in range(2):  # The rate of the first step is 0 under warmup.
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, after)
        after = jax.tree.map(jnp.add, after, updates)
    moved = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(after)}
    moved = {path: leaf != before[path] for path, leaf in moved.items()}
    links = [path.removesuffix("phi") for path in before if path.endswith("phi")]
    assert len(links) == 2
    for link in links:
        assert not before[f"{link}phi"].any(), "weight decay must not move a frozen column"
        for part, (gate, columns) in MAPS.items():
            assert np.all(moved[f"{link}alpha"][..., gate] == (part in learned)), part
            for name in ("phi", "bias"):
                assert np.all(moved[f"{link}{name}"][..., columns] == (part in learned)), (part, name)
    rest = [leaf for path, leaf in moved.items() if "_connection/" not in path]
    assert len(rest) > 5
    assert all(leaf.any() for leaf in rest)
