"""The training loop and its parts: optimizers, checkpoints, devices, several processes."""
