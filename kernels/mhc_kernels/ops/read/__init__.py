"""Read of a sub-layer: h = H_pre x."""
