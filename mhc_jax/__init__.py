"""One decoder, many connections: residual, Hyper-Connections, Manifold-Constrained Hyper-Connections."""
