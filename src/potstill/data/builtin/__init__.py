"""Data sets known by name: one file each, with the options that it takes."""
