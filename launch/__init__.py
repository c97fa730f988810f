"""The command line and the launching of processes."""
