"""Token-wise coefficients of mHC: RMS statistics, projection, gates and Sinkhorn (mHC Eq. 7, 8)."""
