"""The training loop and its parts: optimizers, checkpoints, devices, distributed training."""
