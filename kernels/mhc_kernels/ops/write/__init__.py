"""Write the output of a branch to the streams: x' = H_res x + H_post^T y."""
