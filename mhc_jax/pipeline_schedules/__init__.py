"""Schedules of pipeline parallelism, as tables that say what each device does in each tick.

`tables` generates the tables, `validate` proves that a table is a correct pipeline, and `simulate` computes the time of a step.
Nothing here runs a model: `mhc_jax.pipeline` does.
"""
