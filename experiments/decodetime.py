"""Time the decoding of a token with and without the key-value cache.  Several connections take turns in one process.

    python experiments/decodetime.py --config=experiments/configs/demo.py --config.data.sequence_length=512
    python experiments/decodetime.py --config=experiments/configs/demo.py --connections=residual,mhc:num_streams=8

With the cache the second half of a sequence is decoded.  Without it a token costs one forward pass over the sequence.
"""

import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mhc_jax import cli
from mhc_jax.connections import parse, spec
from mhc_jax.generation import CHUNK, Generator
from mhc_jax.model import Decoder
from mhc_jax.train_step import init_state

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "The first is the baseline.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Decodings of each; the order turns every round.", lower_bound=1)
VOCABULARY = 264
"""Vocabulary size of the byte tokenizer.  Prompts are random ids, so that no text is read."""


def token_times(generator: Generator, prompt: np.ndarray, count: int) -> list[float]:
    """Decode `count` tokens in chunks of `CHUNK`, and return the seconds per token of each chunk but the last.

    The pass over the prompt, which makes the first token, is not timed.
    """
    ends: list[float] = []
    generator.generate([prompt], count, ended=lambda _row, _made: ends.append(time.perf_counter()) or False)
    return [(after - before) / CHUNK for before, after in itertools.pairwise(ends)]


def main() -> None:
    """Print a Markdown table of median milliseconds per token with and without the cache, and of their ratios.

    With the cache the second half of a sequence of T = data.sequence_length tokens is decoded.  Without the cache a token costs one
    forward pass over T tokens.
    """
    base = CONFIG().with_settings(model={"vocab_size": VOCABULARY})
    T = base.data.sequence_length
    prompt = np.random.default_rng(0).integers(0, 256, T // 2)
    configs = [base.with_settings(model={"connection": parse(kind)}) for kind in CONNECTIONS.value]
    runs = {}
    for config in configs:
        params = jax.jit(lambda c=config: init_state(c).params)()
        generator = Generator(config.model, params, T, shortest=T)
        model = Decoder(config.model)
        whole = jax.jit(lambda p, t, at, m=model: m.apply({"params": p}, t, at=at)[0].argmax(-1))
        runs[spec(config.model.connection)] = (generator, whole, [], [])
    padded, last = jnp.zeros((1, T), jnp.int32), jnp.full(1, T - 2)
    for k in range(ROUNDS.value + 1):
        for name in list(runs) if k % 2 else list(runs)[::-1]:
            generator, whole, with_cache, without = runs[name]
            decoded = token_times(generator, prompt, T // 2)
            began = time.perf_counter()
            jax.block_until_ready(whole(generator.params, padded, last))
            if k:  # The first round compiles and is not timed.
                with_cache += decoded
                without.append(time.perf_counter() - began)
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), one sequence of {T} tokens\n")
    print("| connection | with cache (ms/token) | ratio | without (ms/token) | without / with |")
    print("| --- | --- | --- | --- | --- |")
    medians = {name: tuple(map(statistics.median, times)) for name, (_, _, *times) in runs.items()}
    baseline, _ = next(iter(medians.values()))
    for name, (cached, plain) in medians.items():
        print(f"| {name} | {1e3 * cached:.2f} | {cached / baseline:.2f} | {1e3 * plain:.1f} | {plain / cached:.1f} |")


if __name__ == "__main__":
    cli.main(main, computes=True)
