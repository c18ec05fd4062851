"""Time the train step of several connections, alternating in one run, and count what the compiler makes of them.

python experiments/steptime.py --config=experiments/configs/demo.py [--connections=residual,hc,mhc] [--rounds=20]
"""

import dataclasses
import statistics
import time

import jax
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec
from mhc_jax.cost import counts
from mhc_jax.sweeps.grid import over, plan
from mhc_jax.train_step import init_state, make_train_step

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "The first is the baseline.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "Steps of each; the order turns every round.")
VOCABULARY = 264
"""Of the byte tokenizer; no text is read here."""


def main() -> None:
    """Print a Markdown table: median step time, ratio to the first connection, compile time, fusions, FLOPs, memory."""
    base = CONFIG()
    shape = (base.data.batch_size, base.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1)}
    runs, rows = {}, {}
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=VOCABULARY))
    for run in plan(to_mapping(base), over("connection", CONNECTIONS.value)):
        config, name = run.config, spec(run.config.model.connection)
        state = jax.jit(lambda c=config: init_state(c))()
        step = make_train_step(config)
        flops = counts.flops(step, state, batch) / tokens.size
        began = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        compile_s = time.perf_counter() - began
        fusions = str(compiled.as_text()).count(" fusion(")
        rows[name] = [compile_s, fusions, flops, (counts.compiled_memory(compiled) or 0) / 2**20]
        runs[name] = [compiled, state, []]
    for k in range(ROUNDS.value + 1):
        for name in list(runs) if k % 2 else list(runs)[::-1]:
            compiled, state, times = runs[name]
            began = time.perf_counter()
            state, _ = compiled(state, batch)
            jax.block_until_ready(state)
            if k:  # the first round warms up
                times.append(time.perf_counter() - began)
            runs[name][1] = state
    medians = {name: statistics.median(run[2]) for name, run in runs.items()}
    baseline = next(iter(medians.values()))
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), batch {shape[0]} x {shape[1]}\n")
    print("| connection | step (ms) | ratio | compile (s) | fusions | FLOPs/token | memory (MiB) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (compile_s, fusions, flops, memory) in rows.items():
        print(
            f"| {name} | {1e3 * medians[name]:.1f} | {medians[name] / baseline:.2f} | {compile_s:.1f} | {fusions} | "
            f"{flops / 1e6:.2f}M | {memory:.0f} |"
        )


if __name__ == "__main__":
    cli.main(main)
