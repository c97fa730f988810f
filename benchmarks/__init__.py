"""Measurements of speed and memory, each a script: `python -m benchmarks.<name> [--json FILE]`."""
