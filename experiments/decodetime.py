"""Time a token of decoding, with the cache and without, for several connections, alternating in one run.

python experiments/decodetime.py --config=experiments/configs/demo.py [--connections=residual,hc,mhc] [--tokens=512]
"""

import dataclasses
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec
from mhc_jax.generation import CHUNK, Generator
from mhc_jax.model import Decoder
from mhc_jax.sweeps.grid import over, plan
from mhc_jax.train_step import init_state

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "The first is the baseline.")
TOKENS = flags.DEFINE_integer("tokens", 512, "Length of the sequence; its second half is decoded.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Of each connection; the order turns every round.")
VOCABULARY = 264
"""Of the byte tokenizer; no text is read here."""


def main() -> None:
    """Print a Markdown table: milliseconds a token with the cache, without it, and their ratio; medians over rounds."""
    base, T = CONFIG(), TOKENS.value
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, vocab_size=VOCABULARY))
    prompt = np.random.default_rng(0).integers(0, 256, T // 2)
    runs = {}
    for run in plan(to_mapping(base), over("connection", CONNECTIONS.value)):
        config, name = run.config, spec(run.config.model.connection)
        params = jax.jit(lambda c=config: init_state(c).params)()
        generator = Generator(config.model, params, T, shortest=T)
        model = Decoder(config.model)
        whole = jax.jit(lambda p, t, at, m=model: m.apply({"params": p}, t, at=at)[0].argmax(-1))
        runs[name] = (generator, whole, [], [])
    padded, last = jnp.zeros((1, T), jnp.int32), jnp.full(1, T - 2)
    for k in range(ROUNDS.value + 1):
        for name in list(runs) if k % 2 else list(runs)[::-1]:
            generator, whole, with_cache, without = runs[name]
            ends = []
            generator.generate(
                [prompt], T // 2, ended=lambda _row, _made, ends=ends: ends.append(time.perf_counter()) or False
            )
            began = time.perf_counter()
            jax.block_until_ready(whole(generator.params, padded, last))
            if k:  # the first round compiles
                # The first call back comes after the prompt, the others after CHUNK tokens each.
                with_cache += [(after - before) / CHUNK for before, after in itertools.pairwise(ends)]
                without.append(time.perf_counter() - began)
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), one sequence of {T} tokens\n")
    print("| connection | with cache (ms/token) | ratio | without (ms/token) | without / with |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for name, (_, _, with_cache, without) in runs.items():
        cached, plain = statistics.median(with_cache), statistics.median(without)
        first = first or cached
        print(f"| {name} | {1e3 * cached:.2f} | {cached / first:.2f} | {1e3 * plain:.1f} | {plain / cached:.1f} |")


if __name__ == "__main__":
    cli.main(main)
