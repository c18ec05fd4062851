"""Benchmarks of trained models, run by lm-evaluation-harness.

`harness` needs that library (the extra `eval`), and so do the functions of `run`; the other modules work without it.
"""
