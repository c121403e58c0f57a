"""Benchmarks: official data layouts to records, answers kept line by line, scores with intervals, a report."""
