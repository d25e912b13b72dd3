"""Validation of a data set (``potstill check``): every problem, each with path and reason."""
