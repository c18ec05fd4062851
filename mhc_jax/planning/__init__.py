"""Estimates of what train steps cost on machines that are not at hand, from compilation for TPUs and simulation of pipelines."""
