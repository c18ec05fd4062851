"""What the TPU compiler makes of residual, mHC as plain XLA and mHC with the Pallas kernels; it needs libtpu and no TPU.

    make test-aot    # once: brings libtpu to .venv/aot
    PYTHONPATH=.venv/aot .venv/bin/python experiments/tpu_estimate.py [--topology=v5p:2x2x1] [--width=2560] [--heads=32]

Forward and gradient of two layers of the decoder on one chip, 2 x 4096 tokens; weights of branches, streams and activations in
bfloat16, flash attention.  Cycles are the compiler's own estimates, summed over the program, loops by their trip count.  It has
none for a Pallas kernel: those of mHC count by the bytes of their cost estimate at the chip's peak bandwidth, those of attention,
the same in every program, by their FLOPs at its peak, less than they can take, so that the ratios are upper bounds.
"""

import functools
import os
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax

import jax
from absl import flags

from mhc_jax import cli, connections
from mhc_jax.config import ModelConfig
from mhc_jax.cost import hlo
from mhc_jax.planning.compile_ahead import compile_lowered, layers_gradient
from mhc_jax.planning.slices import Chip, get_slice

TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "The first of its chips is compiled for.")
WIDTH = flags.DEFINE_integer("width", 2560, "C.")
HEADS = flags.DEFINE_integer("heads", 32, "Attention heads, of width 128.")
MLP_WIDTH = flags.DEFINE_integer("mlp_width", 12288, "Hidden width of SwiGLU.")
SCOPED_VMEM = flags.DEFINE_integer(
    "scoped_vmem_kib", 32768, "xla_tpu_scoped_vmem_limit_kib; 0: the compiler's default."
)
PROGRAMS = flags.DEFINE_list("programs", ["residual:xla", "mhc:xla", "mhc:pallas_tpu"], "Connection:implementation.")
BATCH, TOKENS, LAYERS, HEAD = 2, 4096, 2, 128


def attention_cycles(chip: Chip) -> float:
    """Two matrix products forward and five backward, over half of T x T."""
    return chip.flops_cycles(7.0 * LAYERS * BATCH * HEADS.value * TOKENS**2 * HEAD)


def kernel_cycles(chip: Chip, one: hlo.Instruction) -> float:
    """By bytes; attention has none and is added whole."""
    estimate = hlo.kernel_estimate(one)
    return chip.bytes_cycles(estimate[1]) if estimate else 0.0


def model(kind: str) -> ModelConfig:
    """Two layers."""
    sizes: dict[str, Any] = {"width": WIDTH.value, "num_heads": HEADS.value, "num_kv_heads": HEADS.value}
    sizes |= {"head_width": HEAD, "mlp_width": MLP_WIDTH.value, "vocab_size": 256}
    sizes |= {"num_layers": LAYERS, "unroll": LAYERS, "attention": "splash"}
    dtypes: dict[str, Any] = {"compute_dtype": "bfloat16", "stream_dtype": "bfloat16"}
    return ModelConfig(connection=connections.default_config(kind), **sizes, **dtypes)


def main() -> None:
    """Print a Markdown table; ratios are to the first program."""
    options: Any = {"xla_tpu_scoped_vmem_limit_kib": str(SCOPED_VMEM.value)} if SCOPED_VMEM.value else None
    where = get_slice(TOPOLOGY.value)
    print(f"jax {jax.__version__}, {TOPOLOGY.value}, C = {WIDTH.value}, scoped VMEM {SCOPED_VMEM.value} KiB\n")
    print("| connection | cycles (M) | ratio | bytes accessed (GB) | temporary (GB) | fusions | compile (s) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    baseline = None
    for name in PROGRAMS.value:
        kind, implementation = name.split(":")
        lowered = layers_gradient(model(kind), BATCH, TOKENS, where, implementation)
        began = time.perf_counter()
        program = compile_lowered(lowered, options)
        seconds = time.perf_counter() - began
        text = hlo.Program(program.as_text())
        estimate = hlo.cycles(text, functools.partial(kernel_cycles, where.chip)) + attention_cycles(where.chip)
        baseline = baseline or estimate
        moved, temporary = program.cost_analysis()["bytes accessed"], hlo.memory(program)["temporaries"]
        numbers = f"{estimate / 1e6:.1f} | {estimate / baseline:.3f} | {moved / 1e9:.1f} | {temporary / 1e9:.2f}"
        print(f"| {name} | {numbers} | {hlo.fusions(text)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    cli.main(main)
