"""A train step in PyTorch with the package `hyper-connections` of lucidrains, run once for each line on the standard input.

    python kernels/lucidrains_worker.py '{"kind": "mhc", "width": 64, ...}'

`experiments/steptime.py --torch=PYTHON` starts this file with a Python that has `torch` and `hyper-connections` (0.4.11 was
tried), and compares the step with that of JAX on the same machine.  The decoder has the same sizes, but its own random
parameters.  Each step computes the loss and its gradient, clips it, and updates the parameters by AdamW.  The first line of output
is a JSON object with `compile_s`; each line after it says that a step is done.
"""

import json
import sys
import time

import torch
from hyper_connections import hyper_connections, manifold_constrained_hyper_connections
from torch import nn
from torch.nn import functional

PACKAGES = {"hc": hyper_connections, "mhc": manifold_constrained_hyper_connections}
"""The module of the package by kind.  The kind `residual` needs none."""


class Norm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """Return the normed x."""
        return functional.rms_norm(x, x.shape[-1:], self.weight)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and RoPE, after a norm."""

    def __init__(self, width, heads, kv_heads, tokens):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm = Norm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angles = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(self.size // 2) / (self.size // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        """Apply RoPE to x [batch, heads, tokens, size]."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)

    def forward(self, x):
        """Return the output of the branch for x [batch, tokens, width]."""
        x = self.norm(x)
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, self.kv_heads, self.size).transpose(1, 3).unbind(2)
        share = self.heads // self.kv_heads
        q, k, v = self.rotate(q), self.rotate(k).repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """SwiGLU after a norm."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = Norm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """Return the output of the branch."""
        x = self.norm(x)
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """The residual connection around a branch."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        """Return the sum of x and the output of the branch."""
        return x + self.branch(x)


class Decoder(nn.Module):
    """The decoder with one kind of connection; its forward pass returns the mean loss."""

    def __init__(self, kind, width, blocks, heads, kv_heads, hidden, tokens, vocabulary, streams):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        if kind == "residual":
            self.expand = self.reduce = nn.Identity()
            around = lambda branch, index: Residual(branch)  # noqa: E731
        else:
            connect, self.expand, self.reduce = PACKAGES[kind].get_init_and_expand_reduce_stream_functions(streams)
            around = lambda branch, index: connect(dim=width, branch=branch, layer_index=index)  # noqa: E731
        branches = [
            branch
            for _ in range(blocks)
            for branch in (Attention(width, heads, kv_heads, tokens), FeedForward(width, hidden))
        ]
        self.blocks = nn.ModuleList([around(branch, index) for index, branch in enumerate(branches)])
        self.norm, self.out = Norm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, inputs, targets):
        """Return the mean loss in nats per token."""
        x = self.expand(self.embedding(inputs))
        for block in self.blocks:
            x = block(x)
        logits = self.out(self.norm(self.reduce(x)))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    """Make the decoder, run its step twice, and then run it at every line of the input."""
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(sizes.pop("threads"))
    batch, compiled = sizes.pop("batch"), sizes.pop("compile")
    torch.manual_seed(0)
    model = Decoder(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(model) if compiled else model
    inputs, targets = torch.randint(0, sizes["vocabulary"], (2, batch, sizes["tokens"]))

    def step():
        loss(inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    began = time.perf_counter()
    step()
    step()
    print(json.dumps({"compile_s": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


if __name__ == "__main__":
    main()
