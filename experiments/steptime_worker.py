"""A train step of the checkout that this process imports, run once for each line on the standard input.

`experiments/steptime.py --against` starts this file with the modules of another commit.  It therefore uses only names that have
been the same for long.  The first line of output is a JSON object with `compile_s`; each line after it says that a step is done.
"""

import json
import sys
import time

import jax
import numpy as np

from mhc_jax import cli
from mhc_jax.remat_plan import resolve
from mhc_jax.train_step import init_state, make_train_step

CONFIG = cli.define_config()


def main() -> None:
    """Compile the step, run it once, and then run it at every line of the input."""
    config = resolve(CONFIG())[0]
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1)}
    began = time.perf_counter()
    shapes = jax.eval_shape(lambda: init_state(config))
    step = jax.jit(make_train_step(config), donate_argnums=0).lower(shapes, batch).compile()
    compile_s = time.perf_counter() - began
    state, _ = step(jax.jit(lambda: init_state(config))(), batch)
    jax.block_until_ready(state)
    print(json.dumps({"compile_s": compile_s}), flush=True)
    for _ in sys.stdin:
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        print("done", flush=True)


if __name__ == "__main__":
    cli.main(main)
