"""Connections for other people's models: `connect` for Flax Linen and NNX, `Wiring` for bare JAX and Equinox."""
