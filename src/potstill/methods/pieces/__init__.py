"""What losses of several papers are made of."""
