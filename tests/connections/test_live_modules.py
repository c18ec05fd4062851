"""Modules of Hugging Face transformers run beside ours on the CPU; skipped where torch or transformers is not installed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden_values import check_deepseek_v4, check_head, check_hy_v4
from support.tolerances import GOLDEN, assert_close

from mhc_jax import connections

with warnings.catch_warnings():  # torch and transformers warn at import about themselves
    warnings.simplefilter("ignore")
    reason = "needs torch and transformers >= 5.23: pip install -e .[hf]"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", minversion="5.23", reason=reason)
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
    from transformers.models.hy_v4 import modeling_hy_v4 as hy_v4
    from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

C, B, T = 24, 2, 5


class Settings:
    """The settings that these modules read."""

    def __init__(self, n):
        self.hc_mult = self.hc_count = n
        self.hidden_size, self.hc_lowrank, self.hc_sinkhorn_iters = C, 6, 20
        self.hc_eps, self.rms_norm_eps, self.hc_magnitude = 1e-6, 1e-6, 2.0


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(n):
    generator = torch.Generator().manual_seed(n)
    shapes = ((B, T, n, C), (B, T, C), (B, T, C), (B, T, n, C))
    x, y, w_h, w_x = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), y.requires_grad_(), w_h, w_x


def as_jax(tensors):
    return {name: jnp.asarray(t.detach().numpy()) for name, t in tensors.items()}


def values_and_gradients(module, x, y, h, x_out, w_h, w_x):
    """The entries of a golden file, computed now."""
    ((h * w_h).sum() + (x_out * w_x).sum()).backward()
    leaves = {"x": x, "y": y, **dict(module.named_parameters())}
    grads = {f"grad_{name}": t.grad for name, t in leaves.items()}
    return as_jax({**leaves, **grads, "h": h, "x_out": x_out, "w_h": w_h, "w_x": w_x})


@pytest.mark.parametrize("n", [2, 4, 8])
def test_deepseek_v4_live(n):
    module = randomized(deepseek_v4.DeepseekV4HyperConnection(Settings(n)), n)
    x, y, w_h, w_x = inputs(n)
    post, comb, h = module(x)
    x_out = post[..., None] * y[..., None, :] + torch.matmul(comb.transpose(-1, -2), x)
    g = values_and_gradients(module, x, y, h, x_out, w_h, w_x)
    check_deepseek_v4({**g, **as_jax({"post": post, "comb": comb})}, n)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("source", ["deepseek_v4", "hy_v4"])
def test_head_live(source, n):
    cls = {"deepseek_v4": deepseek_v4.DeepseekV4HyperHead, "hy_v4": hy_v4.HYV4HyperHead}[source]
    module = randomized(cls(Settings(n)), n)
    x = inputs(n)[0]
    check_head(as_jax({**dict(module.named_parameters()), "x": x, "out": module(x)}), n)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_hy_v4_live(n):
    module = randomized(hy_v4.HYV4HyperConnection(Settings(n)), n)
    x, y, w_h, w_x = inputs(n)
    post, h = module(x)
    x_out = post[..., None] * y[..., None, :] + x
    check_hy_v4({**values_and_gradients(module, x, y, h, x_out, w_h, w_x), **as_jax({"post": post})}, n)


@pytest.mark.parametrize("n", [2, 4])
def test_qwen4_exp_live(n):
    """Kind `gated`, whose norm weight is that of Qwen4-Exp plus 1."""
    module = randomized(qwen4_exp.Qwen4ExpTextGatedResidual(Settings(n)), n)
    x, y, w_h, w_x = inputs(n)
    h, kept, post = module(x.flatten(2))
    x_out = kept.unflatten(-1, (n, C)) + post[..., None] * y[..., None, :]
    g = values_and_gradients(module, x, y, h, x_out, w_h, w_x)
    names = {
        "norm": "hc_norm.weight",
        "down": "input_mix_weight_down.weight",
        "up": "input_mix_weight_up.weight",
        "inject": "block_inject_weight.weight",
    }
    params = {name: g[theirs] + 1 if name == "norm" else g[theirs].T for name, theirs in names.items()}
    config = connections.parse(f"gated:num_streams={n}:rank=6")
    link = connections.connection_module(config)(config, C, 2, 0)

    def ours(x, y, params):
        flat, variables = x.reshape(B, T, -1), {"params": params}
        c = link.apply(variables, flat, method="coefficients")
        h = link.apply(variables, flat, c, method="read")
        return h, link.apply(variables, flat, c, y, method="write").reshape(x.shape)

    h_ours, x_ours = jax.jit(ours)(g["x"], g["y"], params)
    assert_close(h_ours, g["h"], GOLDEN, "h")
    assert_close(x_ours, g["x_out"], GOLDEN, "x_out")

    def loss(*a):
        h, x_out = ours(*a)
        return (h * g["w_h"]).sum() + (x_out * g["w_x"]).sum()

    dx, dy, dparams = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(g["x"], g["y"], params)
    assert_close(dx, g["grad_x"], GOLDEN, "gradient of x")
    assert_close(dy, g["grad_y"], GOLDEN, "gradient of y")
    for name, theirs in names.items():
        assert_close(np.asarray(dparams[name]).T, g[f"grad_{theirs}"], GOLDEN, f"gradient of {name}")
