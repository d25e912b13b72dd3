"""Figures of a model: streaming and exact metrics, agreement with the teacher, significance, cost."""
