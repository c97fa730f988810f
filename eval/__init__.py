"""Benchmarks in, recalls and pictures out."""
