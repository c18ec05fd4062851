"""Schedules of pipeline parallelism as tables of ticks.

`tables` generates the tables, `validate` proves that a table is a correct pipeline, and `simulate` computes how long a step takes.
Nothing here runs a model: `mhc_jax.pipeline` does.
"""
