"""A local web page and JSON API for trying a run's models on images; bounded, and no image is stored (G16)."""
