"""The coefficients of each token: RMS statistics, projection, gates and Sinkhorn (mHC Eq. 7, 8)."""
