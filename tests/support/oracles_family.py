"""Float64 NumPy loops of all kinds but `residual`, one token at a time, straight from the formulas, without code of the library.

`STEP[kind](x, y, p, **settings) -> (h, x')` gives the read h [C] and the written streams x' [n, C], for parameters p as a dict.
"""

import itertools
import math

import numpy as np
from support.oracles import hc_coefficients, read, rms, sigmoid, sinkhorn_log, write


def softmax(v):
    e = [math.exp(a - max(v)) for a in v]
    return np.array([a / sum(e) for a in e])


def gates(x, p, eps_norm=1e-20, eps=0.0, eps_post=0.0):
    """pre and post of mHC, and the logits of H_res."""
    n = len(x)
    v = x.reshape(-1)
    z = (v @ p["phi"]) / rms(v, eps_norm)
    alpha, bias = p["alpha"], p["bias"]
    pre = np.array([sigmoid(alpha[0] * z[i] + bias[i]) + eps for i in range(n)])
    post = np.array([2 * sigmoid(alpha[1] * z[n + i] + bias[n + i]) + eps_post for i in range(n)])
    return pre, post, [alpha[-1] * z[k] + bias[k] for k in range(2 * n, len(z))]


def permutation_mixing(logits, n):
    """Sum over all orders sigma of a weight times the matrix that takes stream sigma(i) to i."""
    H = np.zeros((n, n))
    for weight, order in zip(softmax(logits), itertools.permutations(range(n)), strict=True):
        for i in range(n):
            H[i, order[i]] += weight
    return H


def kronecker_mixing(logits, n):
    H = np.ones((1, 1))
    for k in range(0, len(logits), 2):
        p = softmax(logits[k : k + 2])[0]
        H = np.kron(H, np.array([[p, 1 - p], [1 - p, p]]))
    assert H.shape == (n, n)
    return H


def circulant_mixing(logits, n, g):
    weights = softmax(logits)
    H = np.zeros((n, n))
    for i in range(n):
        for k in range(n):
            shift = (1 - g if k == 0 else 0.0) + g * weights[k]
            H[i, (i + k) % n] += shift
    return H


def orthostochastic_mixing(logits, n, s):
    m = n * s
    A, k = np.zeros((m, m)), 0
    for i in range(m):
        for j in range(i + 1, m):
            A[i, j], A[j, i] = logits[k], -logits[k]
            k += 1
    assert k == len(logits)
    Q = (np.eye(m) - A) @ np.linalg.inv(np.eye(m) + A)
    H = np.zeros((n, n))
    for i in range(m):
        for j in range(m):
            H[i // s, j // s] += Q[i, j] ** 2 / s
    return H


def hc_step(x, y, p, tanh):
    W = p["W"]
    columns = W[:, 0], W[:, 1], W[:, 2:]
    pre, post, res = hc_coefficients(x, p["A_m"], p["B"], p["A_r"], *columns, p["s_a"], p["s_b"], tanh)
    return read(x, pre), write(x, y, post, res)


def step_with(mixing):
    def step(x, y, p, eps=(1e-20, 0.0, 0.0), **settings):
        pre, post, logits = gates(x, p, *eps)
        res = mixing(logits, len(x), **settings)
        return read(x, pre), write(x, y, post, res)

    return step


def identity_mix_step(x, y, p, t_max):
    pre, post, logits = gates(x, p)
    n, a = len(x), sigmoid(p["share_logit"])
    S = sinkhorn_log(np.reshape(logits, (n, n)), t_max)
    res = [[(1 - a) * (i == j) + a * S[i, j] for j in range(n)] for i in range(n)]
    return read(x, pre), write(x, y, post, np.array(res))


def mhc_step(x, y, p, t_max, rank=1):
    pre, post, logits = gates(x, p)
    n, v = len(x), x.reshape(-1)
    out = write(x, y, post, sinkhorn_log(np.reshape(logits, (n, n)), t_max))
    if rank > 1:
        z = (v @ p["write_phi"]) / rms(v, 1e-20)
        for k in range(rank - 1):
            for i in range(n):
                more = 2 * sigmoid(p["write_alpha"][0] * z[k * n + i] + p["write_bias"][k * n + i]) - 1
                out[i] = out[i] + more * p["write_scale"][k] * y
    return read(x, pre), out


def lanes_step(x, y, p, sublayer):
    """`sublayer` is l - 1: attention has 0, 2, ... and reads lane 0."""
    return x[sublayer % 2], np.array([x[i] + p["post"][i] * y for i in (0, 1)])


def scalar_gated_step(x, y, p):
    return x[0], p["lam"] * x + p["mu"] * y


def single_pass_step(x, y, p, pre):
    """A step that reads with `pre` of the sub-layer before."""
    _, post, logits = gates(x, p)
    return read(x, pre), write(x, y, post, sinkhorn_log(np.reshape(logits, (len(x), -1))))


def gated_step(x, y, p, eps_norm=1e-6):
    n, C = x.shape
    z = np.array([[x[i, c] / rms(x[i], eps_norm) * p["norm"][i * C + c] for c in range(C)] for i in range(n)])
    flat = z.reshape(-1)
    low = [a / n for a in flat @ p["down"]]
    g = sigmoid(np.array([a * sigmoid(a) for a in low]) @ p["up"]).reshape(n, C)
    h = np.array([sum(g[i, c] * z[i, c] for i in range(n)) / n for c in range(C)])
    post = [2 * sigmoid(a / n) for a in flat @ p["inject"]]
    return h, np.array([x[i] + post[i] * y for i in range(n)])


def attention_over_depth(V, w, seen, heads, eps_norm=1e-20):
    """Sum of the first `seen` rows of V [S, C], with a softmax for each group of C / heads channels."""
    group = len(w) // heads
    out = np.zeros(len(w))
    for h in range(heads):
        own = range(h * group, (h + 1) * group)
        logits = [sum(w[c] * V[i, c] for c in own) / rms(V[i], eps_norm) for i in range(seen)]
        for i, a in enumerate(softmax(logits)):
            for c in own:
                out[c] += a * V[i, c]
    return out


def attnres_block_step(V, y, p, sublayer, block_size, heads=1):
    """V [S, C] is the embedding, then one sum for each group; groups that have not begun are not read.  `sublayer` is l - 1."""
    begun = 1 + len({j // block_size for j in range(sublayer)})
    out = np.array(V)
    out[1 + sublayer // block_size] += y
    return attention_over_depth(V, p["w"], begun, heads), out


def delta_attnres_step(state, y, p, sublayer, block_size, heads=1):
    """The state is the stream, the embedding, then one sum for each group but the last; unfinished groups are not read."""
    finished = [b for b in range(sublayer) if (b + 1) * block_size <= sublayer]
    out = np.array(state)
    out[0] += y
    slot = 2 + sublayer // block_size
    if slot < len(out):
        out[slot] += y
    if sublayer == 0:
        return state[0], out
    return state[0] + p["g"] * attention_over_depth(state[1:], p["w"], 1 + len(finished), heads), out


def mudd_mix(state, blocks, p, eps_norm=1e-6):
    """The mix of x = state[0] and of the first `blocks` streams after it.  Without p["gamma"] there are no norms."""
    seen = [*(state[1 + j] for j in range(blocks)), state[0]]
    hidden = [z / 2 * (1 + math.erf(z / math.sqrt(2))) for z in (state[0] / rms(state[0], eps_norm)) @ p["W1"]]
    columns = [*range(blocks), len(p["bias"]) - 1]
    a = [sum(h * p["W2"][k, s] for k, h in enumerate(hidden)) + p["bias"][s] for s in columns]
    if "gamma" not in p:
        return sum(w * v for w, v in zip(a, seen, strict=True))
    inner = sum(w * v / rms(v, eps_norm) for w, v in zip(a, seen, strict=True))
    return state[0] + p["gamma"] * inner / rms(inner, eps_norm)


def mudd_step(state, y, p, sublayer, block_size):
    """The state is the stream x, then X_0, X_1, ... of the blocks that have begun."""
    block, within = divmod(sublayer, block_size)
    h = state[0] if within or not block else mudd_mix(state, block, p)
    out = np.array(state)
    if not within:
        out[1 + block] += state[0]
    out[0] = h + y
    return h, out


STEP = {
    "hc": hc_step,
    "mhc": mhc_step,
    "scalar_gated": scalar_gated_step,
    "identity": step_with(lambda logits, n: np.eye(n)),
    "mhc_lite": step_with(permutation_mixing),
    "kromhc": step_with(kronecker_mixing),
    "circulant": step_with(circulant_mixing),
    "diagonal": step_with(lambda logits, n: np.diag([sigmoid(z) for z in logits])),
    "identity_mix": identity_mix_step,
    "go_mhc": step_with(orthostochastic_mixing),
    "lanes": lanes_step,
    "single_pass": single_pass_step,
    "gated": gated_step,
    "attnres_block": attnres_block_step,
    "delta_attnres": delta_attnres_step,
    "mudd": mudd_step,
}
