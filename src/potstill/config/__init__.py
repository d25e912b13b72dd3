"""Recipes: every setting of a run, read from YAML, overridden by flags, and validated without importing torch."""
