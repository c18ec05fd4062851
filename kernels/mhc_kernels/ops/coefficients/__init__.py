"""The coefficients of each token, made from its streams by RMSNorm, projection, sigmoids and Sinkhorn (mHC Eq. 7, 8)."""
