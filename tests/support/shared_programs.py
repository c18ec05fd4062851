"""Programs that runs of one configuration share, so that a test which trains again neither traces nor compiles again.

They live as long as the process, so that a test which changes what a step computes must not train with this fixture.
"""

import dataclasses
import functools

import jax
import pytest

from mhc_jax.runs import programs


def _of_the_settings(make):
    """`make`, with one result for all configurations that differ in nothing but where their text lies."""

    def shared(config):
        nowhere = dataclasses.replace(config.data, source="text", validation_source="")
        return make(dataclasses.replace(config, data=nowhere))

    return shared


_MAKERS = ("make_train_step", "make_eval_step", "make_diagnostics_step")
_SHARED = {name: _of_the_settings(functools.cache(getattr(programs, name))) for name in _MAKERS}
_SHARED["init_state"] = _of_the_settings(jax.jit(programs.init_state, static_argnums=0))


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Let the runs of a module that imports this fixture make each of their programs once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in _SHARED.items():
            patch.setattr(programs, name, make)
        yield
