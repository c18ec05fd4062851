"""Schedules of pipeline parallelism as tables of ticks.

`tables` generates them, `validate` proves that a table is a correct pipeline, and `simulate` computes how long one takes.  Nothing
here runs a model: `mhc_jax.pipeline` does.
"""
