"""Classifiers: images -> logits, and nothing of distillation."""
