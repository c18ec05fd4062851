"""Machines that are not here: programs compiled for slices of TPUs, and what a step would take on them."""
