"""Time the train step with several connections that take turns in one process, and count its FLOPs, fusions and memory.

python experiments/steptime.py --config=experiments/configs/demo.py [--connections=residual,hc,mhc] [--rounds=20]
python experiments/steptime.py --config=experiments/configs/demo.py --connections=mhc --optimizers=adamw,muon
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.connections import parse, spec
from mhc_jax.cost import counts, hlo
from mhc_jax.remat_plan import resolve
from mhc_jax.timing.step_times import CompiledStep, compile_step
from mhc_jax.train_step import make_train_step

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "The first is the baseline.")
OPTIMIZERS = flags.DEFINE_list("optimizers", [], "Names of optimizers; none: the configuration's.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "Steps of each; the order turns every round.", lower_bound=1)
VOCABULARY = 264
"""Vocabulary size of the byte tokenizer.  Token ids are random, so that no text is read."""


def median_times(steps: dict[str, CompiledStep], rounds: int) -> dict[str, float]:
    """Time compiled train steps, one for each connection, and return the median seconds of each over all rounds, by name.

    In a round each of them runs once.  One more round, the first, warms up and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds + 1):
        for name in list(steps) if k % 2 else list(steps)[::-1]:
            began = time.perf_counter()
            steps[name].launch(k)
            jax.block_until_ready(steps[name].state)
            if k:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Print a Markdown table: median step time, its ratio to the first connection's, compile time, fusions, FLOPs, memory."""
    base = CONFIG().with_settings(model={"vocab_size": VOCABULARY})
    shape = (base.data.batch_size, base.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1)}
    optimizers = OPTIMIZERS.value or [base.optimizer.name]
    settings = [
        {"model": {"connection": parse(kind)}, "optimizer": {"name": optimizer}}
        for optimizer in optimizers
        for kind in CONNECTIONS.value
    ]
    configs = [resolve(base.with_settings(**sections))[0] for sections in settings]
    steps, flops = {}, {}
    for config in configs:
        name = spec(config.model.connection) + (f" {config.optimizer.name}" if len(optimizers) > 1 else "")
        steps[name] = compile_step(config, batch)
        flops[name] = counts.flops(make_train_step(config), steps[name].state, batch) / tokens.size
    medians = median_times(steps, ROUNDS.value)
    baseline = next(iter(medians.values()))
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), batch {shape[0]} x {shape[1]}\n")
    print("| connection | step (ms) | ratio | compile (s) | fusions | FLOPs/token | memory (MiB) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, step in steps.items():
        ratio = f"{1e3 * medians[name]:.1f} | {medians[name] / baseline:.2f} | {step.compile_s:.1f}"
        fusions = hlo.fusions(str(step.compiled.as_text()))
        print(f"| {name} | {ratio} | {fusions} | {flops[name] / 1e6:.2f}M | {step.memory / 2**20:.0f} |")


if __name__ == "__main__":
    cli.main(main, computes=True)
