"""What the README promises: its example works as printed, and the files it names exist."""

import dataclasses
import importlib
import math
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
from support.tolerances import assert_close

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONTRACT = (
    "contract_shapes_and_dtypes",
    "boundary_is_write_coefficients_read",
    "start_writes_nothing",
    "every_parameter_has_a_gradient",
    "dense_fills_in_disabled_components",
)


def test_the_example_connection_works_as_printed(monkeypatch):
    (code,) = re.findall(r"```python\n(# mhc_jax/connections/diagonal.py\n.*?)```", README, re.DOTALL)
    module = types.ModuleType("diagonal")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    (line,) = re.findall(r'`("diagonal": Diagonal)` in `KINDS`', README)
    monkeypatch.setitem(connections.KINDS, *eval("{" + line + "}", module.__dict__).popitem())

    monkeypatch.syspath_prepend(ROOT / "tests/connections")
    tests = importlib.import_module("test_connections")
    for contract in CONTRACT:
        getattr(tests, f"test_{contract}")("diagonal")
    model = ModelConfig(vocab_size=31, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=24)
    decoder = Decoder(dataclasses.replace(model, connection=connections.parse("diagonal:init=paper")))
    tokens = jnp.arange(12)[None]
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)
    assert params["params"]["layers"]["mlp_connection"]["bias"].shape == (2, 4 + 4 + 4)
    _, diagnostics = jax.jit(lambda p: decoder.apply(p, tokens, 4))(params)
    kept = 1 / (1 + math.exp(-4))
    for H in diagnostics["res"].reshape(-1, 4, 4):
        assert_close(H, kept * jnp.eye(4))


def test_the_table_has_every_kind():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+\.py)` \|$", README, re.MULTILINE)
    assert {kind for kind, _ in rows} == set(connections.KINDS)
    assert all((ROOT / "mhc_jax/connections" / name).exists() for _, name in rows)


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b((?:mhc_jax|kernels|experiments|tests|docs)/[\w/.-]+\.\w+)", README))
    named -= {"mhc_jax/connections/diagonal.py", "experiments/sweeps/mine.py"}  # the examples
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
