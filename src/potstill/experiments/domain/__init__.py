"""From one domain to another: who sees which images, and what is said of it."""
