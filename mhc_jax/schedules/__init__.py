"""Schedules of pipelines: tables of ticks, the proof that they are valid, and their cost."""
