"""What the README promises: its example works as printed, and the files it names exist."""

import dataclasses
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_connection_works_as_printed(monkeypatch):
    (code,) = re.findall(r"```python\n(# mhc_jax/connections/scalar_gated.py\n.*?)```", README, re.DOTALL)
    module = types.ModuleType("scalar_gated")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    (line,) = re.findall(r'`("scalar_gated": ScalarGated)` in `KINDS`', README)
    monkeypatch.setitem(connections.KINDS, *eval("{" + line + "}", module.__dict__).popitem())

    model = ModelConfig(vocab_size=31, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=24)
    tokens = jnp.arange(12)[None]
    logits = {}
    for kind in ("scalar_gated", "residual"):
        decoder = Decoder(dataclasses.replace(model, connection=connections.parse(kind)))
        params = jax.jit(decoder.init)(jax.random.key(0), tokens)
        logits[kind] = jax.jit(lambda p, d=decoder: d.apply(p, tokens, 4))(params)
        if kind == "scalar_gated":
            assert params["params"]["layers"]["mlp_connection"]["lam"].shape == (2,)
            halved = jax.tree.map(lambda a: a, params)
            halved["params"]["layers"]["mlp_connection"]["mu"] *= 0.5
            assert float(jnp.abs(decoder.apply(halved, tokens)[0] - logits[kind][0]).max()) > 1e-3
    assert float(jnp.abs(logits["scalar_gated"][0] - logits["residual"][0]).max()) < 1e-5
    assert logits["scalar_gated"][1]["res"].shape == (4, 4, 1, 1)


def test_every_file_it_names_exists():
    named = set(re.findall(r"\b((?:mhc_jax|kernels|experiments|tests|docs)/[\w/.-]+\.\w+)", README))
    named -= {"mhc_jax/connections/scalar_gated.py"}  # the example
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
