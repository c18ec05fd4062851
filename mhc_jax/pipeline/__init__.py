"""Pipeline parallelism: one SPMD program that runs any schedule of `mhc_jax.pipeline_schedules` on the `stage` axis of a mesh.

The program has run on simulated CPU devices only, never on GPUs or TPUs.  The tests compare its loss and gradients with those of
the decoder without a pipeline.

`executor` is the SPMD program, and `program` compiles the table of a schedule into numbers that it can follow.  `stage`
computes one operation of one stage, and `split` cuts the backward pass of a stage into I and W.  `casts` casts weights once a step,
and `packing` packs what stages send to each other.
"""
