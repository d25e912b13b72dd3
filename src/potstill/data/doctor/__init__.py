"""The data doctor: every problem of a data set, all of them, each with path and reason (``potstill check``)."""
