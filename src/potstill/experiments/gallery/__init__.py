"""Test images that the report shows."""
