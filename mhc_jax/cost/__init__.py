"""Costs that are counted: parameters, FLOPs and bytes of a model or of a compiled program."""
