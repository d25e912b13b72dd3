"""One module per kind of picture; each is a function that draws on a matplotlib Figure."""
