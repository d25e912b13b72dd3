"""Images, classes and splits; what is seen of an image; batches."""
