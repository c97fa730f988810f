"""Backbone, aggregators and facets."""
