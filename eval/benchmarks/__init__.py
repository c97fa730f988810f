"""Benchmarks: what is known, the layouts that it is published in, and its ground truth."""
