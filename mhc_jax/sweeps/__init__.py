"""Sweeps: the grid of runs and their configurations, the processes that train the runs, and the table of results."""
