"""Evaluate trained models on benchmarks with lm-evaluation-harness.

The module `harness` and the functions of `run` need that library (the extra `eval`).  The other modules work without it.
"""
