"""The boundary between two sub-layers: the write of the first, then the coefficients and the read of the second."""
