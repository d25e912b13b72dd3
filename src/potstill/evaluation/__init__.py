"""Evaluation of a model: streaming and final metrics, fidelity to the teacher, significance, calibration, cost."""
