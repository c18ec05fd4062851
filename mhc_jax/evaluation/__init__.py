"""Evaluate trained models on benchmarks with lm-evaluation-harness.

The module `harness` and the functions of `run` need that library, which `pip install '.[eval]'` in the clone installs.  The other
modules work without it.
"""
