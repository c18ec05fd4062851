"""Branches and their parts; none of them knows what a connection is."""
