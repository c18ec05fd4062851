"""The train step of our decoder in PyTorch, with the parameters of the JAX decoder: a peer for whole steps.

`loss_and_gradients` computes the same numbers as the JAX decoder, so that a test can compare them.  `times` times whole train
steps: forward, backward, clipping and AdamW.  `torch.compile` compiles one block, which all blocks share, because a program of
all blocks takes minutes to compile.  Attention is PyTorch's own, which on a GPU is a flash attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peers import EPS_NORM, plain_torch
from torch.nn import functional

THETA = 1e4
"""Base of the frequencies of RoPE."""
STREAMS = 4
"""Number n of streams of `hc` and `mhc`."""
CONNECTIONS = ("residual", "hc", "mhc")
CLIP, RATE, DECAY = 1.0, 3e-4, 0.1
"""Largest norm of the gradient, learning rate and weight decay of the timed steps; they do not change the time of a step."""

Tensors = dict[str, torch.Tensor]
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Streams x [N, n, C], and the pending write: branch output y [N, C], post [N, n] and res [N, n, n]."""


def device() -> str:
    """Return the name of the device: `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm over the last axis of x; the result is float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS_NORM) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings (RoPE) to x [B, T, H, D], as `mhc_jax.layers.rope.rope` does."""
    T, D = x.shape[1], x.shape[-1]
    frequencies = THETA ** (-torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
    angles = torch.arange(T, dtype=torch.float32, device=x.device)[:, None] * frequencies
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    front, back = x.float().chunk(2, -1)
    return torch.cat([front * cos - back * sin, back * cos + front * sin], -1).to(x.dtype)


def attention(p: Mapping[str, torch.Tensor], h: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """Apply the attention branch, without its residual connection, to h [N, C]; N = batch T tokens."""
    x = norm(h, p["norm/weight"]).to(h.dtype)
    q, k, v = (
        (x @ p[name].to(x.dtype)).view(batch, -1, heads, p[name].shape[1] // heads) for name in ("W_q", "W_k", "W_v")
    )
    q, k, v = (a.transpose(1, 2) for a in (rotate(q), rotate(k), v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return mixed.reshape(h.shape[0], -1) @ p["W_o"].to(x.dtype)


def feed_forward(p: Mapping[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """Apply the SwiGLU branch, without its residual connection, to h [N, C]."""
    x = norm(h, p["norm/weight"]).to(h.dtype)
    gate, up, down = (p[name].to(x.dtype) for name in ("W_gate", "W_up", "W_down"))
    return (functional.silu(x @ gate) * (x @ up)) @ down


def hc_coefficients(p: Mapping[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pre [N, n], post [N, n] and res [N, n, n] of dynamic HC (HC Eq. 10-13) for streams x [N, n, C]."""
    D = torch.tanh(norm(x, torch.ones((), device=x.device)) @ p["W"])  # row j comes from stream j
    pre = p["A_m"] + p["s_a"] * D[..., 0]
    return pre, p["B"] + p["s_b"] * D[..., 1], p["A_r"] + p["s_a"] * D[..., 2:].transpose(1, 2)


def boundary(kind: str) -> Callable[[Mapping[str, torch.Tensor], State], tuple[State, torch.Tensor]]:
    """Return the function that writes a pending branch output to the streams and reads the input h of the next branch."""
    ops = plain_torch(STREAMS)

    def residual(p, state):
        x, y, post, res = state
        x = x + y[:, None]
        return (x, y, post, res), x[:, 0]

    def streams(p, state):
        x, y, post, res = state
        (x,) = ops["write"](x, y, post, res)
        made = hc_coefficients(p, x) if kind == "hc" else ops["coefficients"](x, p["phi"], p["alpha"], p["bias"])
        pre, post, res = made
        return (x, y, post, res), ops["read"](x, pre)[0]

    return residual if kind == "residual" else streams


def block_of(kind: str, batch: int, heads: int) -> Callable[[Tensors, State], State]:
    """Return the function of one block (attention, then feed-forward) from its parameters and state to the next state."""
    between = boundary(kind)

    def block(p: Tensors, state: State) -> State:
        for name in ("attention", "mlp"):
            inner = {key.removeprefix(f"{name}/"): value for key, value in p.items() if key.startswith(f"{name}/")}
            link = f"{name}_connection/"
            state, h = between({k.removeprefix(link): v for k, v in p.items() if k.startswith(link)}, state)
            y = attention(inner, h, batch, heads) if name == "attention" else feed_forward(inner, h)
            state = (state[0], y, *state[2:])
        return state

    return block


class Model:
    """The decoder: parameters by the paths of the JAX decoder, one tensor for each block, and the mean loss of a batch."""

    def __init__(self, kind: str, arrays: Mapping[str, np.ndarray], batch: int, heads: int, dtype: str, compiled: bool):
        """Take the parameters, float32, and prepare the function of a block.

        Args:
          kind: `residual`, `hc` or `mhc`.
          arrays: parameters of the JAX decoder by path, such as `layers/mlp/W_up` [blocks, ...].
          batch: number of sequences of a batch.
          heads: number of heads; there are as many heads of keys and values.
          dtype: dtype of streams and products, such as `bfloat16`.
          compiled: whether `torch.compile` compiles the block.
        """
        self.kind, self.dtype = kind, getattr(torch, dtype)
        tensors = {path: torch.tensor(a, device=device()) for path, a in arrays.items()}
        inside = {path.removeprefix("layers/"): a for path, a in tensors.items() if path.startswith("layers/")}
        self.ends = {path: a.requires_grad_() for path, a in tensors.items() if not path.startswith("layers/")}
        depth = len(next(iter(inside.values())))
        self.blocks = [{k: a[i].clone().requires_grad_() for k, a in inside.items()} for i in range(depth)]
        block = block_of(kind, batch, heads)
        self.block = torch.compile(block, dynamic=False) if compiled else block

    def parameters(self) -> list[torch.Tensor]:
        """Return all parameters."""
        return [*self.ends.values(), *(a for block in self.blocks for a in block.values())]

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log likelihood of `targets` [B, T] in nats per token."""
        n = 1 if self.kind == "residual" else STREAMS
        x = self.ends["embedding"][tokens.flatten()].to(self.dtype)
        N, C = x.shape
        post = torch.zeros(N, n, device=x.device)
        res = torch.eye(n, device=x.device).expand(N, n, n).contiguous()
        state = (x[:, None].expand(N, n, C).contiguous(), torch.zeros_like(x), post, res)
        for a in state[1:]:
            a.requires_grad_()  # as in later blocks; otherwise the first block would be compiled on its own
        for p in self.blocks:
            state = self.block(p, state)
        x, y, post, res = state
        if n == 1:
            x = x[:, 0] + y
        else:
            x = plain_torch(n)["write"](x, y, post, res)[0].float()
            x = (x.sum(1) if self.kind == "hc" else x.mean(1)).to(self.dtype)
        x = norm(x, self.ends["final_norm/weight"]).to(self.dtype)
        matrix = self.ends["unembedding"] if "unembedding" in self.ends else self.ends["embedding"].T
        return functional.cross_entropy((x @ matrix.to(x.dtype)).float(), targets.flatten())


def loss_and_gradients(model: Model, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss of a batch and its gradient by path, in the layout of the JAX decoder."""
    loss = model.loss(*(torch.tensor(a, dtype=torch.long, device=device()) for a in (tokens, targets)))
    loss.backward()
    grads = {path: a.grad for path, a in model.ends.items()}
    for path in model.blocks[0]:
        made = [
            torch.zeros_like(block[path]) if block[path].grad is None else block[path].grad for block in model.blocks
        ]
        grads[f"layers/{path}"] = torch.stack(made)
    return loss.item(), {path: np.zeros(()) if g is None else g.cpu().numpy() for path, g in grads.items()}


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the GPU is full."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def forget() -> None:
    """Forget all compiled programs and free their memory; a program that is compiled too often fails instead of running slowly."""
    torch.compiler.reset()
    if hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.cuda.empty_cache()


def step_of(model: Model, batch: Sequence[np.ndarray]) -> Callable[[], None]:
    """Return the train step of a model on a batch [tokens, targets], after it has run once: backward pass, clipping, AdamW."""
    given = [torch.tensor(a, dtype=torch.long, device=device()) for a in batch]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=device() == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(*given).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    step()
    return step


def times(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time train steps: the seconds of each in each round, where they alternate.

    A round takes two steps of each, and the second is timed.
    """
    synchronize = torch.cuda.synchronize if device() == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            steps[name]()
            synchronize()
            began = time.perf_counter()
            steps[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def rows(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return a row for each step: `name`, `status` (ok), `ms` (median), `ms_rounds`, and `overhead` over the step `residual`."""
    base = statistics.median(seconds["residual"])
    return [
        {
            "name": name,
            "status": "ok",
            "ms": 1e3 * (ms := statistics.median(s)),
            "ms_rounds": [1e3 * t for t in s],
            "overhead": ms / base - 1,
        }
        for name, s in seconds.items()
    ]
