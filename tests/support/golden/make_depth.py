"""Make `depth_*.npz`: what public code of connections that read sources of earlier depth computes, at random parameters.

    python make_depth.py FOLDER    # torch 2.13.0 on a CPU, einops

FOLDER has the checkouts nanogpt-attnres-repro (tokenbender, 58e942a), delta-attention-residuals-code (wdlctc, fc11c3e)
and MUDDFormer (Caiyun-AI, fc067b2).  Where a module needs more packages than torch, only the named functions and classes are
taken out of its file.

Sub-layer l of L has the branch y = tanh(h A_l).  Every file has x [B, T, C], A [L, C, C], the parameters in the shapes of
this library, what each branch reads, h [L, B, T, C], and what leaves the last exit, out [B, T, C].
"""

import __future__

import ast
import sys
import types
import typing
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

HERE = Path(__file__).parent
FOLDER = Path(sys.argv[1])
B, T, C, L, EPS = 2, 3, 8, 6, 1e-8
torch.manual_seed(0)
x, A = torch.randn(B, T, C), torch.randn(L, C, C)


def taken(file, *names, **given):
    """The named functions and classes of a file, as `name` or `Class.method`, with `given` as their globals."""
    body = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            body |= {node.name: node} | {f"{node.name}.{m.name}": m for m in inner if isinstance(m, ast.FunctionDef)}
    tree = ast.Module([body[name] for name in names], [])
    flags = __future__.annotations.compiler_flag  # annotations name types that are not imported here
    exec(compile(tree, str(file), "exec", flags), given)
    return types.SimpleNamespace(**given)


def norm_with_weight():
    norm = nn.RMSNorm(C, EPS)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm


def branch(l, h, read):
    read.append(h)
    return torch.tanh(h @ A[l])


def save(name, read, out, **params):
    arrays = {"x": x, "A": A, "h": torch.stack(read), "out": out, **params}
    np.savez(HERE / f"depth_{name}.npz", **{key: value.detach().numpy() for key, value in arrays.items()})


def attnres(block_size):
    sys.path.insert(0, str(FOLDER / "nanogpt-attnres-repro" / "examples" / "nanogpt"))
    import attnres as public

    full, block = public.FullAttnResReference, public.BlockAttnResReference
    model = full(L, C, EPS) if block_size == 1 else block(L, C, block_size, EPS)
    nn.init.normal_(model.mixer.queries)
    for norm in model.mixer.key_norms:
        nn.init.normal_(norm.weight, 1.0, 0.3)
    read, outputs = [], []
    state = None if block_size == 1 else model.init_state(x)
    for l in range(L):
        h = model.layer_input(x, outputs, l) if state is None else model.layer_input(state)
        outputs.append(branch(l, h, read))
        if state is not None:
            model.append_layer_output(state, outputs[-1])
    out = model.final_output(x, outputs) if state is None else model.final_output(state)
    w = model.mixer.queries * torch.stack([norm.weight for norm in model.mixer.key_norms])
    save(f"attnres_{block_size}", read, out, w=w)


def delta():
    """Mode `delta` with the gate `learnable_alpha`: the public decoder layer, with branches and norms of ours."""
    file = FOLDER / "delta-attention-residuals-code" / "Attention-Residuals" / "modeling_qwen3_attnres.py"
    layer = "Qwen3AttnResDecoderLayer"
    names = ("_delta_attn_res_kernel", "delta_attn_res", f"{layer}.forward", f"{layer}._apply_gate")
    public = taken(file, *names, torch=torch, _compiled_delta_kernel=None)
    read, params, blocks, stream = [], {"w": [], "g": []}, [], x
    for l in range(0, L, 2):
        self = types.SimpleNamespace(attnres_mode="delta", use_null_source=False, gate_type="learnable_alpha")
        self._apply_gate = types.MethodType(public._apply_gate, self)
        self.self_attn = lambda hidden_states, l=l, **_: (branch(l, hidden_states, read), None)
        self.mlp = lambda h, l=l: branch(l + 1, h, read)
        self.input_layernorm = self.post_attention_layernorm = lambda h: h
        for name in ("attn", "mlp"):
            query, norm, gate = nn.Linear(C, 1, bias=False), norm_with_weight(), torch.randn(())
            nn.init.normal_(query.weight)
            vars(self).update({f"{name}_res_proj": query, f"{name}_res_norm": norm, f"{name}_res_alpha": gate})
            params["w"].append(query.weight[0] * norm.weight)
            params["g"].append(gate)
        blocks, stream = public.forward(self, blocks, stream)
    save("delta_1", read, stream, **{key: torch.stack(value) for key, value in params.items()})


def mudd():
    """`dense_type` l: the public dense block makes the weights of each mix and mixes; each layer is two branches of ours."""
    file = FOLDER / "MUDDFormer" / "pytorch" / "muddformer" / "modeling_muddformer.py"
    names = ("RMSnormNoscale", "MultiwayDynamicDenseBlock")
    public = taken(file, *names, torch=torch, nn=nn, Tensor=Tensor, rearrange=rearrange, Tuple=typing.Tuple)  # noqa: UP006
    config = types.SimpleNamespace(norm_eps=EPS, dense_type="l", dim=C, expand_last=False, round64=False)
    blocks, S = L // 2, L // 2 + 1
    W1, W2, bias = torch.zeros(blocks, C, S), torch.zeros(blocks, S, S), torch.zeros(blocks, S)
    read, hiddens, stream = [], [x], x
    for b in range(blocks):
        for l in (2 * b, 2 * b + 1):
            stream = stream + branch(l, stream, read)
        hiddens.append(stream)
        dense, sources = public.MultiwayDynamicDenseBlock(config, b, last_layer=b == blocks - 1), [*range(b + 1), S - 1]
        nn.init.normal_(dense.w2.weight)
        static = torch.randn(1, len(sources))
        [stream] = dense.layer_mix(hiddens, dense(stream) + static[:, None, None])
        # The weight of the newest stream is the last one; this library has hidden units that the public code lacks, here zeros.
        W1[b][:, : len(sources)] = dense.w1.weight.T.detach()
        W2[b][: len(sources), sources] = dense.w2.weight.T.detach()
        bias[b][sources] = static[0]
    save("mudd_2", read, stream, W1=W1, W2=W2, bias=bias)


for size in (1, 2, 4):
    attnres(size)
delta()
mudd()
