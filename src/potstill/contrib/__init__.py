"""Applications built on the layers below, which users may copy."""
