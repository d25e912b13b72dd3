"""What networks see inside: their stages, how to read and pair them, and adapters between them.  Needs torch alone."""
