"""Sections of the page: ``..._context(run)`` returns the values of a template, or None if there are none."""
