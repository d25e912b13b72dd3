"""Trained models outside of training: export to other engines, prediction, evaluation."""
