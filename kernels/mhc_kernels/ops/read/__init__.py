"""Read the input of a branch from the streams: h = H_pre x."""
