"""Implementations of the operations, one folder for each operation.

`reference.py` is the formula, as plain as it can be written.  `xla.py` is the program for plain XLA, tuned for CPUs, GPUs and TPUs.
The `pallas_*` files and `triton.py` are kernels.  `mhc_kernels/api.py` checks arguments and chooses one of the files.
"""
