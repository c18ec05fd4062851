"""Make `go_mhc_*.npz` and `identity_mix.npz` with the public code of two kinds of connection.

    python make_connections.py GO_MHC MIX    # torch 2.13.0 and einops on a CPU

GO_MHC is a checkout of github.com/itstorque/go-mHC at 4422d79, and MIX one of github.com/tokenbender/
mHC-manifold-constrained-hyper-connections at f4d7acb, branch feat/mhc-residual-identity-mix.
"""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def go_mhc(checkout):
    """theta [2, n s, n s] and H [2, n, n] of the class in a notebook, which is taken out of it without the plots around it."""
    cells = json.loads((checkout / "toy_models" / "dynamics.ipynb").read_text())["cells"]
    tree = ast.parse("".join(cells[0]["source"]))
    name = "GeneralizedUnistochastic"
    tree.body = [part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name]
    scope = {"torch": torch, "nn": torch.nn, "dtype": torch.float32}
    exec(compile(tree, "dynamics.ipynb", "exec"), scope)
    for n, s in ((2, 1), (4, 2), (8, 2)):
        torch.manual_seed(n)
        module = scope[name](n, s, batch_size=2, init=torch.randn)
        with torch.no_grad():
            np.savez_compressed(HERE / f"go_mhc_n{n}_s{s}.npz", theta=module.raw_u.numpy(), H=module().numpy())


def identity_mix(checkout):
    """Parameters, streams x [2, 5, n, C] and branch output y, the branch's input h, and the streams x_out after the write."""
    sys.path.insert(0, str(checkout))
    from hyper_connections.hyper_connections_mhc import HyperConnections

    n, C = 4, 6
    torch.manual_seed(0)
    module = HyperConnections(n, dim=C, layer_index=1, mhc_residual_identity_mix=True)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_((0.1 if name == "H_res_logits" else 1.0) * torch.randn_like(value))
        x, y = torch.randn(2, 5, n, C), torch.randn(2, 5, C)
        h, add = module(x.permute(0, 2, 1, 3).reshape(2 * n, 5, C))
        x_out = add(y).reshape(2, n, 5, C).permute(0, 2, 1, 3)
    parameters = {name: value.detach().numpy() for name, value in module.named_parameters()}
    settings = {"tau": module.mhc_tau, "num_iters": module.mhc_num_iters}
    np.savez_compressed(HERE / "identity_mix.npz", x=x, y=y, h=h, x_out=x_out, **parameters, **settings)


if __name__ == "__main__":
    go_mhc(Path(sys.argv[1]))
    identity_mix(Path(sys.argv[2]))
