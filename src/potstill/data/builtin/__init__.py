"""Data sets known by name: one file each, with the options that it takes; see ``data.named_datasets``."""
