"""Programs that runs of one configuration share, so that a test which trains again neither traces nor compiles again.

They live as long as the process, so that a test which changes what a step computes must not train with this fixture.
"""

import dataclasses
import functools

import jax
import pytest

from mhc_jax import train_step
from mhc_jax.runs import programs


def _of_the_settings(make):
    """`make`, with one result for all configurations that differ in nothing but where their text lies."""

    def shared(config):
        nowhere = dataclasses.replace(config.data, source="text", validation_source="")
        return make(dataclasses.replace(config, data=nowhere))

    return shared


_MAKERS = {"make_train_step": train_step, "make_eval_step": programs, "make_diagnostics_step": programs}
_SHARED = {name: _of_the_settings(functools.cache(getattr(module, name))) for name, module in _MAKERS.items()}
_INIT = _of_the_settings(jax.jit(programs.init_state, static_argnums=0))


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Let the runs of a module that imports this fixture make each of their programs once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _MAKERS.items():
            patch.setattr(module, name, _SHARED[name])
        patch.setattr(programs, "init_state", _INIT)
        yield
