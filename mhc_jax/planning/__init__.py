"""Costs on machines that are not here: train steps compiled for slices of TPUs, and simulated pipelines."""
