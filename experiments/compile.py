"""What a train step costs on a TPU slice: compiled ahead of time for each connection; it needs libtpu (`make aot`) and no TPU.

    PYTHONPATH=.venv/aot python experiments/compile.py --config=experiments/configs/paper.py:27b:mhc --topology=v5p:4x4x4
    python experiments/compile.py --config=experiments/configs/paper.py:3b:mhc --topology=v6e:8x8 --mesh=fsdp=8,expert=8 \\
        --connections=residual,mhc --config.data.batch_size=64 --json=3b.json

Memory is the compiler's, beside what shapes and shardings say: parameters, optimizer state, gradients, kept streams, logits.  Times
are estimates of a step whose collectives hide behind nothing (`mhc_jax/planning/compile_ahead.py` says how they are made);
their ratios mean more than they do.  MFU is the FLOPs of `cost.counts.model_cost` over time and peak, without and with all
collectives hidden.  `--topology=cpu:8`
tries the command out without libtpu.  A result is kept in the cache folder ($MHC_JAX_CACHE) until configuration, versions or
sources change.  Exit status: 0 all fit, 1 one does not, 2 a mistake in the settings, 130 stopped by Ctrl-C (what is compiled is
kept).
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax

from absl import flags

from mhc_jax import cli
from mhc_jax.config.mapping import to_mapping
from mhc_jax.data.cache import cache_folder
from mhc_jax.planning import compile_ahead
from mhc_jax.planning.slices import get_slice
from mhc_jax.planning.table import estimates, table
from mhc_jax.runs.environment import environment

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice: v5p:4x4x4, v5e:16x16, v6e:8x8, v4:4x4x4 or cpu:8.", required=True
)
MESH = flags.DEFINE_string(
    "mesh", "", "axis=size,...: stage, data, fsdp, tensor, expert, sequence; empty: fsdp over all devices."
)
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "Kinds, with settings as kind:key=value.")
IMPLEMENTATION = flags.DEFINE_string("implementation", "", "Of the connections; empty: pallas_tpu, xla on a CPU.")
LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Search the largest batch that fits: three compiles more, at least."
)
JSON = flags.DEFINE_string("json", "", "File to write everything to.")


def main() -> int:
    """Compile, print, write."""
    where = get_slice(TOPOLOGY.value)
    given = CONFIG()
    mesh = compile_ahead.parse_mesh(MESH.value, len(where.devices))
    config = compile_ahead.best_attention(dataclasses.replace(given, mesh=mesh), where.platform)
    implementation = compile_ahead.check_implementation(IMPLEMENTATION.value)
    rows = estimates(config, CONNECTIONS.value, where, implementation, cache_folder() / "compiled", LARGEST.value)
    model, data = config.model, config.data
    steps = config.optimizer.accumulation_steps
    print(
        f"{where.name}, {len(where.devices)} devices, mesh {mesh}; {data.batch_size} x {data.sequence_length} tokens in {steps} "
        f"accumulation steps, attention {model.attention}, model.remat {model.remat}\n\n{table(rows, where)}"
    )
    if JSON.value:
        whole = {"env": environment(), "topology": where.name, "config": to_mapping(config), "rows": rows}
        Path(JSON.value).write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if all(row["fits"] for row in rows) else 1


def guarded() -> int:
    """Ctrl-C: the thread that compiles cannot be stopped, the process can."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; what is compiled is kept", file=sys.stderr, flush=True)
        os._exit(130)


if __name__ == "__main__":
    cli.main(guarded)
