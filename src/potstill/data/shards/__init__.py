"""Images in tar files, on this machine or in object storage, laid out as WebDataset has it."""
