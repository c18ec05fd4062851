"""Float64 NumPy loops written from the formulas of the papers, one token at a time; they share no code with the library.

Layouts are those of the papers: x [n, C] for one token.  Gradients (`*_vjp`) are the chain rule written out, and a test compares
each of them with central differences.
"""

import math

import numpy as np
from support.tolerances import SLOPES, assert_close


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def sinkhorn(logits, t_max=20):
    """Sinkhorn of mHC Eq. 9 on one [n, n] matrix: exp, then columns and rows in turn, t_max times."""
    M = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    n = len(M)
    for _ in range(t_max):
        for j in range(n):
            M[:, j] = M[:, j] / sum(M[i, j] for i in range(n))
        for i in range(n):
            M[i, :] = M[i, :] / sum(M[i, j] for j in range(n))
    return M


def sinkhorn_log(logits, t_max=20):
    """Sinkhorn of mHC Eq. 9 in the log domain, for logits whose exponentials leave the range of float64."""
    L = np.array(logits, np.float64)
    n = len(L)
    for _ in range(t_max):
        for j in range(n):
            L[:, j] -= np.logaddexp.reduce(L[:, j])
        for i in range(n):
            L[i, :] -= np.logaddexp.reduce(L[i, :])
    return np.exp(L)


def sinkhorn_v4(comb_logits, t_max=20, eps=1e-6):
    """DeepSeek-V4's `comb` on one [n, n] matrix: row softmax + eps, columns, then t_max - 1 times rows, columns."""
    L = np.asarray(comb_logits, np.float64)
    M = np.exp(L - L.max(1, keepdims=True))
    M = M / M.sum(1, keepdims=True) + eps
    M = M / (M.sum(0, keepdims=True) + eps)
    for _ in range(t_max - 1):
        M = M / (M.sum(1, keepdims=True) + eps)
        M = M / (M.sum(0, keepdims=True) + eps)
    return M


def sinkhorn_vjp(logits, G, t_max=20):
    """Gradient of sum(G * sinkhorn_log(logits)), in reverse through each normalisation, a softmax of log M."""
    L = np.array(logits, np.float64)
    states = []
    for _ in range(t_max):
        for axis in (0, 1):
            L = L - np.logaddexp.reduce(L, axis=axis, keepdims=True)
            states.append((axis, np.exp(L)))
    A = np.asarray(G, np.float64) * np.exp(L)
    for axis, M in reversed(states):
        A = A - M * A.sum(axis=axis, keepdims=True)
    return A


def rms(v, eps):
    return math.sqrt(sum(float(a) ** 2 for a in v) / len(v) + eps)


def mhc_coefficients(x, phi, alpha, bias, t_max=20, eps_norm=1e-20):
    """Coefficients of mHC Eq. 7 and 8 for one token: x [n, C] -> (pre [n], post [n], res [n, n])."""
    n, _ = x.shape
    v = x.reshape(-1)
    z = (v @ phi) / rms(v, eps_norm)
    pre = np.array([sigmoid(alpha[0] * z[i] + bias[i]) for i in range(n)])
    post = np.array([2 * sigmoid(alpha[1] * z[n + i] + bias[n + i]) for i in range(n)])
    logits = np.array([[alpha[2] * z[2 * n + i * n + j] + bias[2 * n + i * n + j] for j in range(n)] for i in range(n)])
    return pre, post, sinkhorn_log(logits, t_max)


def mhc_coefficients_vjp(x, phi, alpha, bias, G_pre, G_post, G_res, t_max=20, eps_norm=1e-20):
    """Gradients of sum(G_pre pre) + sum(G_post post) + sum(G_res res) for one token, by the chain rule: (x, phi, alpha, bias)."""
    n, _ = x.shape
    v = x.reshape(-1)
    r = rms(v, eps_norm)
    z = (v @ phi) / r
    part = np.array([0] * n + [1] * n + [2] * n * n)  # which alpha belongs to each column
    a = alpha[part] * z + bias
    s = sigmoid(a[: 2 * n])
    d_a = np.concatenate(
        [
            G_pre * s[:n] * (1 - s[:n]),
            G_post * 2 * s[n:] * (1 - s[n:]),
            sinkhorn_vjp(a[2 * n :].reshape(n, n), G_res, t_max).ravel(),
        ]
    )
    d_z = alpha[part] * d_a
    d_alpha = np.array([sum(d_a[k] * z[k] for k in range(len(z)) if part[k] == p) for p in range(3)])
    # z = v phi / r with dr/dv = v / (len(v) r)
    d_v = phi @ d_z / r - (d_z @ z) * v / (len(v) * r * r)
    return d_v.reshape(x.shape), np.outer(v, d_z) / r, d_alpha, d_a


def hc_coefficients(x, A_m, B, A_r, W_m, W_b, W_r, s_a, s_b, tanh=True, eps_norm=1e-20):
    """Coefficients of HC Eq. 10-13 for one token, H_res untransposed: the dynamic part of res[i, j] comes from stream j."""
    n, _ = x.shape
    squash = math.tanh if tanh else lambda v: v
    normed = [row / rms(row, eps_norm) for row in x]
    pre = np.array([A_m[i] + s_a * squash(float(normed[i] @ W_m)) for i in range(n)])
    post = np.array([B[i] + s_b * squash(float(normed[i] @ W_b)) for i in range(n)])
    res = np.array([[A_r[i, j] + s_a * squash(float(normed[j] @ W_r[:, i])) for j in range(n)] for i in range(n)])
    return pre, post, res


def read(x, pre):
    """Read of one token: h = sum_i pre_i x_i."""
    h = np.zeros(x.shape[1])
    for i in range(len(x)):
        h += pre[i] * x[i]
    return h


def write(x, y, post, res):
    """Write of one token: x'_i = sum_j res_ij x_j + post_i y."""
    out = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            out[i] += res[i, j] * x[j]
        out[i] += post[i] * y
    return out


def stream_measures(x):
    """Signed cosine, absolute cosine and participation ratio of streams [S, n, C] or [n, C], from their definitions.

    Cosines are means over pairs of streams that are not zero.  The ratio is (sum of eigenvalues)^2 / (sum of their squares) of the
    Gram matrix, averaged over tokens.  Each is 1 where there is nothing to average or all streams are zero.
    """
    x = np.asarray(x, np.float64)
    cosines, ranks = [], []
    for streams in x.reshape(-1, *x.shape[-2:]):
        length = [math.sqrt(sum(v * v for v in stream)) for stream in streams]
        for i in range(len(streams)):
            for j in range(i):
                if length[i] and length[j]:
                    cosines.append(sum(streams[i] / length[i] * (streams[j] / length[j])))
        singular = np.linalg.svd(streams / (max(length) or 1), compute_uv=False)
        ranks.append(sum(singular**2) ** 2 / sum(singular**4) if max(length) else 1)
    cosines = cosines or [1]
    return [np.mean(cosines), np.mean(np.abs(cosines)), np.mean(ranks)]


def numerical_gradient(f, arrays, step=1e-6):
    """Central differences of a float64 scalar function with respect to every entry of every array."""
    grads = []
    for k, a in enumerate(arrays):
        g = np.zeros_like(a)
        for index in np.ndindex(a.shape):
            shifted = []
            for sign in (1, -1):
                moved = [np.array(b) for b in arrays]
                moved[k][index] += sign * step
                shifted.append(f(*moved))
            g[index] = (shifted[0] - shifted[1]) / (2 * step)
        grads.append(g)
    return grads


def as_float64(params):
    """Convert the parameters of a layer, with a norm as its weight alone."""
    plain = {name: value["weight"] if isinstance(value, dict) else value for name, value in params.items()}
    return {name: np.asarray(value, np.float64) for name, value in plain.items()}


def assert_slopes(f, at, grads):
    """Compare float32 gradients along random directions with central differences of the float64 f at a dict of arrays."""
    random = np.random.default_rng(1)
    for name, grad in grads.items():
        direction = random.normal(size=grad.shape)
        above, below = (f({**at, name: at[name] + step * direction}) for step in (1e-6, -1e-6))
        assert_close((grad * direction).sum(), (above - below) / 2e-6, SLOPES, name, terms=grad * direction)
