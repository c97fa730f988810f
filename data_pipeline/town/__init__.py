"""The embedded data set: a procedural town, so that a first run needs no download."""
