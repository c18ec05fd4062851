"""Analysis of run folders: records of runs, statistics over seeds, variants and comparisons."""
