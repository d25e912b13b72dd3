"""Distilled against baseline, in figures and in sentences."""
