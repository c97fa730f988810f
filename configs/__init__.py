"""Typed configuration: the schema and the recipes."""
