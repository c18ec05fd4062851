"""Learning-rate schedules, WSD among them."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from mhc_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    r"""Return the function from the index of an update, 0 ... N - 1, to its learning rate, float32 [].  N is `steps`.

    Update $k$ is step $s = k + 1$ of metrics.jsonl.  Steps 1 to W (`warmup_steps`) are the warm-up, in which the rate is $s / W$
    times the peak.  So the rate is never 0, and step W has the peak.  After the warm-up the rate is the peak times a factor:

    - `constant`: 1;
    - `cosine`: $f + (1 - f) (1 + \cos \pi p) / 2$, where $p$ grows from 0 at step max(W, 1) to 1 at step N;
    - `wsd` (warm-up, stable, decay; Hu et al., arXiv 2404.06395): $f + (1 - f) (1 - p)$, where $p$ is 0 until step max(W, N - D)
      and grows to 1 at step N.  The decay is linear and takes a fifth of the run, D = max(N // 5, 1) steps.  The paper leaves the
      form of the decay open;
    - `step`: 1 until 80 % of the N steps, then 0.316, and 0.1 after 90 % (mHC Table 5).

    $f$ is `final_fraction`, and step N of `cosine` and `wsd` has exactly this factor.  In two cases step N has the peak instead: if
    all steps are warm-up (W = N), and if N = 1.

    Examples:
      Warm-up of 2 steps, a stable phase, and a decay over the last 2 of 10 steps.

      >>> config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, final_fraction=0.0)
      >>> print(schedule(config, 10)(jnp.arange(10)))
      [0.5 1.  1.  1.  1.  1.  1.  1.  0.5 0. ]
    """
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_fraction
    begin = max(warmup, 1)
    if config.schedule == "wsd":
        begin = max(begin, steps - max(steps // 5, 1))

    def rate(count):
        step = jnp.asarray(count) + 1
        part = jnp.clip((step - begin) / max(steps - begin, 1), 0.0, 1.0)
        factors = {
            "constant": lambda: 1.0,
            "cosine": lambda: final + (1 - final) * (1 + jnp.cos(jnp.pi * part)) / 2,
            "wsd": lambda: final + (1 - final) * (1 - part),
            "step": lambda: jnp.where(10 * step > 9 * steps, 0.1, jnp.where(10 * step > 8 * steps, 0.316, 1.0)),
        }
        return peak * jnp.where(step <= warmup, step / max(warmup, 1), factors[config.schedule]())

    return rate
