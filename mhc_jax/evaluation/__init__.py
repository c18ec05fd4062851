"""Benchmarks of trained models.  `harness`, `tasks` and `run` need lm-evaluation-harness (the extra `eval`); the others do not."""
