"""Multi-head latent attention as loops over positions and heads, float64."""

import numpy as np


def rotated(v, t):
    """Pairs (d, d + R/2) turned by t 1e4^(-2d/R)."""
    R = len(v)
    out = np.zeros(R)
    for d in range(R // 2):
        angle = t * 1e4 ** (-2 * d / R)
        a, b = v[d], v[d + R // 2]
        out[d], out[d + R // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def normed(v, weight):
    return v / np.sqrt((v**2).mean() + 1e-20) * weight


def mla_oracle(p, h, H):
    """One sequence [T, C], one position and one of H heads after another; float64."""
    RANK = len(p["kv_norm"])
    D, R = p["W_o"].shape[0] // H, p["W_kv_down"].shape[1] - RANK
    x = [normed(row, p["norm"]) for row in h]
    latent = [normed((row @ p["W_kv_down"])[:RANK], p["kv_norm"]) for row in x]
    k_R = [rotated((row @ p["W_kv_down"])[RANK:], t) for t, row in enumerate(x)]
    out = np.zeros((len(h), H * D))
    for t, row in enumerate(x):
        for head in range(H):
            q = (row @ p["W_q"])[head * (D + R) : (head + 1) * (D + R)]
            kv = [(c @ p["W_kv_up"])[head * 2 * D : (head + 1) * 2 * D] for c in latent]
            scores = np.array([(q[:D] @ kv[s][:D] + rotated(q[D:], t) @ k_R[s]) / np.sqrt(D + R) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, head * D : (head + 1) * D] = sum(weights[s] * kv[s][D:] for s in range(t + 1))
    return out @ p["W_o"]
