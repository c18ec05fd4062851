"""Compare every kind of connection with residual, with equal seeds.

    python experiments/sweep.py experiments/sweeps/second_wave.py --workdir=runs/second_wave

Kinds that have presets begin with `init=home`, so that their streams differ and H_res can matter; mHC is there with its own
`init=paper` too.  Expect: with five seeds few kinds are told from residual, and kinds that differ in H_res alone
are not told apart.  Cost: 105 runs of 10 to 60 s on 2 CPU cores, about half an hour in all.
"""

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

HOME = ("mhc", "identity", "diagonal", "identity_mix", "go_mhc", "mhc_lite", "kromhc", "circulant", "single_pass")
DEPTH = ("attnres_block", "attnres_block:heads=4", "attnres_block:block_size=1", "delta_attnres", "mudd")


def get_sweep() -> Sweep:
    """Return the sweep: every connection with each of five seeds."""
    kinds = ["residual", "hc", "mhc:init=paper", *(f"{kind}:init=home" for kind in HOME), "mhc:init=home:write_rank=2"]
    kinds += ["scalar_gated", "gated", "lanes", *DEPTH]
    return Sweep(base="../configs/prototype.py", points=product(over("connection", kinds), seeds(5)))
