"""Several processes that carry out one run, on one machine or on several; torchrun starts them."""
