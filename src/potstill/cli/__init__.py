"""The command line.  torch is imported only by the commands that need it, so that --help is fast."""

from potstill.cli.entry import main as main

__all__ = ["main"]
