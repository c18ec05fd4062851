"""The boundary between two sub-layers: write of the first, then coefficients and read of the second."""
