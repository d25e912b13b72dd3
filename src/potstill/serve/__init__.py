"""A page and a JSON API for trying a run's models on images, by guarantee G16: local, bounded, nothing kept."""
