"""Datasets to tar shards to place batches."""
