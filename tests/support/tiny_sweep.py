"""Writes a sweep file and its config file: five tiny runs, of which the first cannot train on a CPU."""

import json
from pathlib import Path

from support.tiny_runs import tiny, write_text

from mhc_jax.config.mapping import to_mapping

SWEEP = '''"""A tiny sweep.

It is for tests.
"""
from mhc_jax.sweeps.grid import Sweep, over, product, seeds

def get_sweep():
    broken = [{"connection": "residual", "model.compute_dtype": "float16"}]
    points = broken + product(seeds(2), over("connection", ["residual", "mhc:num_streams=2:t_max=2"]))
    return Sweep(base="config.py", points=points)
'''


def write_sweep(folder: Path) -> Path:
    write_text(folder / "text.txt")
    (folder / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(base(folder))!r}))\n"
    )
    (folder / "tiny.py").write_text(SWEEP)
    return folder / "tiny.py"


def base(tmp_path: Path) -> dict:
    return to_mapping(tiny(tmp_path / "text.txt"))
