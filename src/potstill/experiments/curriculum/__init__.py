"""Images in the order of their difficulty."""
