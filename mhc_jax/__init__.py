"""A decoder with exchangeable connections: residual, Hyper-Connections, Manifold-Constrained Hyper-Connections and others."""
