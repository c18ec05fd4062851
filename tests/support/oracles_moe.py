"""DeepSeekMoE as float64 loops over tokens and experts."""

import jax
import numpy as np

WEIGHTS = ("W_gate", "W_up", "W_down")


def swiglu(x, W_gate, W_up, W_down):
    gate = x @ W_gate
    return (gate / (1 + np.exp(-gate)) * (x @ W_up)) @ W_down


def moe_oracle(p, h, k, scale):
    """(output, load) of the branch with parameters p, without balancing."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    out = np.zeros(h.shape)
    load = np.zeros(len(p["router_bias"]))
    for place in np.ndindex(*h.shape[:2]):
        x = np.asarray(h[place], np.float64)
        x = x / np.sqrt((x**2).mean() + 1e-20) * p["norm"]["weight"]
        s = 1 / (1 + np.exp(-x @ p["W_router"]))
        chosen = np.argsort(-(s + p["router_bias"]), kind="stable")[:k]
        for e in chosen:
            load[e] += 1
            out[place] += scale * s[e] / s[chosen].sum() * swiglu(x, *(p[name][e] for name in WEIGHTS))
        if "W_shared_gate" in p:
            width = p["W_gate"].shape[-1]
            for i in range(p["W_shared_gate"].shape[1] // width):
                part = slice(i * width, (i + 1) * width)
                out[place] += swiglu(
                    x, p["W_shared_gate"][:, part], p["W_shared_up"][:, part], p["W_shared_down"][part]
                )
    return out, load
