"""Benchmarks: cases measured side by side in one run, accuracy, and the overhead of a request. Nothing here prints."""
