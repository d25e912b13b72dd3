"""The command line.  Nothing here imports torch before a command needs it, so that help appears at once."""

from potstill.cli.entry import main as main

__all__ = ["main"]
