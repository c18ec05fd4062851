"""What the TPU compiler makes of residual, mHC as plain XLA and mHC with the Pallas kernels; it needs libtpu and no TPU.

    python experiments/tpu_estimate.py [--topology=v5p:2x2x1] [--layers=2] [--width=2560] [--heads=20] [--mlp_width=12288]

Forward and gradient of the decoder on one chip, bfloat16 branches and streams.  Cycles are the compiler's own estimates, summed
over the program, loops by their trip count.  It has none for a Pallas kernel: that counts by the bytes of its cost estimate at
the bandwidth and clock of v5p, as if memory alone were its limit.
"""

import os
import re
import time
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")  # before jax: no metadata server says which TPU this is

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from mhc_kernels import settings

from mhc_jax import connections
from mhc_jax.config import ModelConfig
from mhc_jax.model import Decoder

TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "The first of its chips is compiled for.")
LAYERS = flags.DEFINE_integer("layers", 2, "Blocks.")
WIDTH = flags.DEFINE_integer("width", 2560, "C.")
HEADS = flags.DEFINE_integer("heads", 20, "Attention heads.")
MLP_WIDTH = flags.DEFINE_integer("mlp_width", 12288, "Hidden width of SwiGLU.")
BATCH = flags.DEFINE_integer("batch", 2, "Sequences.")
LENGTH = flags.DEFINE_integer("length", 4096, "Tokens a sequence.")
VOCABULARY = 256
"""Small: the stack is what is compared."""
BYTES_PER_CYCLE = 2.765e12 / 1.75e9
PROGRAMS = {"residual": ("residual", "xla"), "mhc, xla": ("mhc", "xla"), "mhc, pallas_tpu": ("mhc", "pallas_tpu")}


def cycles(program: str) -> float:
    """Estimated cycles of an HLO program."""
    bodies: dict[str, list[str]] = {}
    current = ""
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = "ENTRY" if header[1] else header[2]
        bodies.setdefault(current, []).append(line)

    def of(name: str) -> float:
        total = 0.0
        for line in bodies[name]:
            if loop := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += of(loop[1]) * int(trips[1] if trips else 1)
            elif estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                total += int(estimate[1])
            elif kernel := re.search(r'tpu_custom_call.*"bytes_accessed":"?(\d+)', line):
                total += int(kernel[1]) / BYTES_PER_CYCLE
        return total

    return of("ENTRY")


def compiled(kind: str, implementation: str) -> tuple[Any, float]:
    """(program, seconds it took to compile)."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        width=WIDTH.value,
        num_layers=LAYERS.value,
        num_heads=HEADS.value,
        num_kv_heads=HEADS.value,
        mlp_width=MLP_WIDTH.value,
        compute_dtype="bfloat16",
        stream_dtype="bfloat16",
        connection=connections.default_config(kind),
    )
    model = Decoder(config)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value)
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    tokens = jax.ShapeDtypeStruct((BATCH.value, LENGTH.value), jnp.int32, sharding=chip)

    def loss(params, tokens):
        return model.apply({"params": params}, tokens)[0].mean()

    with settings(platform="tpu", implementation=implementation):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=chip), shapes)
        lowered = jax.jit(jax.grad(loss)).lower(shapes, tokens)
        began = time.perf_counter()
        return lowered.compile(), time.perf_counter() - began


def main(_) -> None:
    """Print a Markdown table."""
    stack = f"{LAYERS.value} layers, C = {WIDTH.value}, {BATCH.value} x {LENGTH.value} tokens"
    print(f"jax {jax.__version__}, {TOPOLOGY.value}, {stack}\n")
    print(
        "| connection | cycles (M) | ratio | bytes accessed (GB) | temporary (GB) | fusions | kernels | compile (s) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    baseline = None
    for name, (kind, implementation) in PROGRAMS.items():
        program, seconds = compiled(kind, implementation)
        text = str(program.as_text())
        estimate = cycles(text)
        baseline = baseline or estimate
        gigabytes = program.cost_analysis()["bytes accessed"] / 1e9
        temporary = program.memory_analysis().temp_size_in_bytes / 1e9
        print(
            f"| {name} | {estimate / 1e6:.1f} | {estimate / baseline:.3f} | {gigabytes:.1f} | {temporary:.2f} ", end=""
        )
        print(f"| {text.count(' fusion(')} | {text.count('tpu_custom_call')} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
