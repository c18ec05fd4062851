"""The Sinkhorn-Knopp projection onto doubly stochastic matrices (mHC Eq. 9)."""
