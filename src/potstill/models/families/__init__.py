"""Where classifiers come from: one module for each family of names."""
