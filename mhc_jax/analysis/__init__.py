"""Runs read back, and what they show: records, statistics, variants and comparisons."""
