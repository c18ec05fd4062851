"""Boundary between two sub-layers: write of the first, coefficients and read of the second."""
