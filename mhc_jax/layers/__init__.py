"""The branches of a block and their parts.  None of them knows which connection surrounds it."""
