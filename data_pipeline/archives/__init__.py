"""Photographs inside tars and zips of others: found, indexed, regrouped by place."""
