"""Data sets of others, each read as places with photographs."""
