"""A database encoded once: built over ranks, grown, opened, asked where photographs were taken."""
