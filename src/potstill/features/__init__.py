"""What networks compute inside: stages, reading and pairing them, and adapters between them. Needs torch alone."""
