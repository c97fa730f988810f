"""The memory queue and the losses over all ranks."""
