"""Estimate memory and time of a train step on a slice of TPUs, by compiling it with each connection on a machine without TPUs.

    PYTHONPATH=.venv/aot python experiments/compile.py --config=experiments/configs/paper.py:27b:mhc --topology=v5p:4x4x4 \\
        --config.mesh.fsdp=64
    PYTHONPATH=.venv/aot python experiments/compile.py --config=experiments/configs/paper.py:3b:mhc --topology=v6e:8x8 \\
        --config.mesh.fsdp=8 --config.mesh.expert=8 --connections=residual,mhc --config.data.batch_size=64 --json=3b.json

With `--mesh=best` the sizes of mesh.data, mesh.fsdp and mesh.expert are chosen.  The whole step with the first connection is
compiled on every mesh of the slice that may hold it, and the fastest mesh on which all connections fit is taken.  The time of
collectives grows with optimizer.accumulation_steps, so the fewest accumulation steps that fit into memory are the fastest.

The next command estimates two dense blocks of width 2560 on one chip, with connections that XLA compiles without Pallas kernels:

    PYTHONPATH=.venv/aot python experiments/compile.py --config=experiments/configs/paper.py:27b:mhc --topology=v5p:1x1x1 \\
        --implementation=xla --config.model.num_layers=2 --config.model.experts= --config.model.attention_kind=gqa \\
        --config.model.vocab_size=256 --config.model.remat=none --config.data.batch_size=2

The command needs libtpu (`make aot`).  `--topology=cpu:8` tries the command out without libtpu.

The table has the memory that the compiler reports.  Beside it stand the parts that follow from shapes and shardings: parameters,
optimizer state, gradients, kept streams, logits.  Times assume that no collective runs beside other work
(`mhc_jax/planning/step_estimate.py` says how they are estimated).  Their ratios are more reliable than the times themselves.  MFU
(model FLOPs utilization) is the FLOPs of `cost.counts.model_cost`, divided by the time and by the peak FLOPs per second.  It is
given twice: with no collective hidden behind other work, and with all collectives hidden.

A result is kept in the cache folder ($MHC_JAX_CACHE) until configuration, versions or sources change.  Exit status: 0 every step
fits into memory, 1 one does not, 2 a mistake in the settings, 130 stopped by Ctrl-C (results so far are kept).
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # This variable must be set before jax is imported.

from absl import flags
from mhc_kernels.backend_choice import IMPLEMENTATIONS

from mhc_jax import cli
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.data.cache import cache_folder
from mhc_jax.errors import require
from mhc_jax.planning import mesh_choice
from mhc_jax.planning.compile_ahead import best_attention
from mhc_jax.planning.compile_table import Row, estimates, markdown
from mhc_jax.planning.slices import get_slice
from mhc_jax.runs.environment import environment

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice: v5p:4x4x4, v5e:16x16, v6e:8x8, v4:4x4x4 or cpu:8.", required=True
)
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "Kinds, with settings as kind:key=value.")
IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, IMPLEMENTATIONS, "Of the connections' operations; pallas_tpu if not given, xla on a CPU."
)
MESH = flags.DEFINE_enum("mesh", None, ["best"], "best: choose mesh.data, mesh.fsdp and mesh.expert by compiling.")
LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Search the largest batch that fits: three compiles more, at least."
)
JSON = flags.DEFINE_string("json", "", "File to write everything to.")


def main() -> int:
    """Compile the train steps, print the tables, and write the file of --json.  Return 1 if a step does not fit, else 0."""
    require(len(CONNECTIONS.value) > 0, "--connections is empty; name at least one, as in --connections=residual,mhc.")
    written = Path(JSON.value).parent
    require(written.is_dir(), f"There is no folder {str(written)!r} for the file of --json; make it first.")
    where = get_slice(TOPOLOGY.value)
    config = best_attention(CONFIG(), where.platform)
    folder = cache_folder() / "compiled"

    def compiled(config: ExperimentConfig, kinds: Sequence[str], largest: bool = False) -> list[Row]:
        return estimates(config, kinds, where, IMPLEMENTATION.value, folder, largest)

    meshes: list[Row] = []
    if MESH.value == "best":
        mesh, meshes = mesh_choice.best_mesh(config, CONNECTIONS.value, where, compiled)
        config = dataclasses.replace(config, mesh=mesh)
        print(mesh_choice.markdown(meshes, where), end="\n\n")
    rows = compiled(config, CONNECTIONS.value, LARGEST.value)
    data, policies = config.data, dict.fromkeys(row["remat"] for row in rows)
    print(
        f"{where.name}, {len(where.devices)} devices, mesh {config.mesh}; {data.batch_size} x {data.sequence_length} tokens in "
        f"{config.optimizer.accumulation_steps} accumulation steps, attention {config.model.attention}, "
        f"model.remat {', '.join(policies)}\n\n"
        f"{markdown(rows, where)}"
    )
    if JSON.value:
        whole = {"env": environment(), "topology": where.name, "config": to_mapping(config), "rows": rows}
        whole |= {"meshes": meshes} if meshes else {}
        Path(JSON.value).write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if all(row["fits"] for row in rows) else 1


def guarded() -> int:
    """Run `main`.  Ctrl-C ends the whole process, because the thread that compiles cannot be stopped."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; what is compiled is kept", file=sys.stderr, flush=True)
        os._exit(130)


if __name__ == "__main__":
    cli.main(guarded)
