"""Images, classes and splits; transforms and augmentation; batches."""
