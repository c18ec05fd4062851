"""Grids of runs: points and configurations, processes that train them, and the table of results."""
