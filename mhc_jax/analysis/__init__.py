"""Analysis of run folders: their content, statistics over seeds, variants and comparisons."""
