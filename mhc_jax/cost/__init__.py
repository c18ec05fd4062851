"""Counts of what a model or a compiled program costs: parameters, FLOPs and bytes."""
