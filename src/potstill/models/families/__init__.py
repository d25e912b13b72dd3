"""Families of classifiers: one module for each prefix of names."""
