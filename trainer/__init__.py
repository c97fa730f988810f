"""The training loop, its engine, checkpoints and tracking."""
