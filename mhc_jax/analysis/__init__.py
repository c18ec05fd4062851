"""Runs read back, and what they show: records, statistics, settings and comparisons."""
