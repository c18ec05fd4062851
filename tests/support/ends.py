"""Ways in which a run ends early: by a signal, by a kill, or by a loss that is not a number."""

import signal

import numpy as np
import pytest

from mhc_jax import loop
from mhc_jax.data import Data, load_data


class Killed(BaseException):
    """Stands for kill -9, because nothing catches it."""


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Raise a signal while the metrics of `step` are read, when the next step is already on its way."""
    read = loop.read

    def reading(run, history, at, metrics):
        if at == step:
            signal.raise_signal(number)
        read(run, history, at, metrics)

    monkeypatch.setattr(loop, "read", reading)


def kill_at(monkeypatch, name, when=lambda *args: True):
    """Let `loop.train` die instead of calling `loop.name` once `when(arguments)` holds."""
    real = getattr(loop, name)

    def dying(*args, **kwargs):
        if when(*args):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, name, dying)


def train_until_killed(config, folder, name, when=lambda *args: True):
    """Train, and die as `kill_at` says."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, name, when)
        with pytest.raises(Killed):
            loop.train(config, folder)


class Poisoned(Data):
    """Data whose batches from step `first` to `last` hold ids without an embedding, for which `jnp.take` gives NaN."""

    first, last = 6, 6

    def train_iterator(self, start_step=0, rows=None):
        iterator, outer = super().train_iterator(start_step, rows), self

        class Iterator:
            close, get_state, set_state = iterator.close, iterator.get_state, iterator.set_state

            def __next__(self):
                batch, step = next(iterator), iterator.get_state()["next_index"]
                bad = outer.first <= step <= outer.last
                return {**batch, "inputs": np.full_like(batch["inputs"], 1 << 20)} if bad else batch

        return Iterator()


def at_read_of(step):
    """For `kill_at` with the name `read`: whether the metrics of this step are read."""
    return lambda run, history, at, metrics: at == step


def poisoned(config):
    return Poisoned(**vars(load_data(config.data)))
