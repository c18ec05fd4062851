"""Write of a sub-layer: x' = H_res x + H_post^T y."""
