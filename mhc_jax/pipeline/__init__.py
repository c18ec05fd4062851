"""Pipeline parallelism: one SPMD program that runs any schedule of `mhc_jax.schedules` on the `stage` axis of a mesh.

It has run on simulated CPU devices only, never on GPUs or TPUs.  The tests compare its loss and gradients with those of the decoder
without a pipeline.

`executor` is the program, and `program` compiles a table for it.  `stage` computes one operation of one stage, and `split` cuts its
backward pass into I and W.  `casts` casts weights once a step, and `boundary` packs what stages send to each other.
"""
