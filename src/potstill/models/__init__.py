"""Classifiers: images -> logits, independent of distillation."""
