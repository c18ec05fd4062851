"""Cost estimates for machines that are not at hand: train steps compiled for slices of TPUs, and simulated pipelines."""
