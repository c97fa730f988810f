"""From a backbone's tokens to one global descriptor: an aggregator a module, named in configs/registry.py."""
