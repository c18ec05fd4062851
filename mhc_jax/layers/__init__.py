"""The branches of a block, and the parts of branches.  No branch knows which connection surrounds it."""
