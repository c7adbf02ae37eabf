"""Timing, intervals, records of experiments, and the claims that the records decide."""
