"""Folders of the operations, one each.

`reference.py` is the formula, as plain as it can be written.  `xla.py` is what plain XLA runs, tuned for each platform, and the
`pallas_*` files and `triton.py` are kernels.  `mhc_kernels/api.py` checks arguments and chooses one of them.
"""
