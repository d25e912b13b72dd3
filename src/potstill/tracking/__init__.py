"""Trackers beside a run: its figures also go to TensorBoard, W&B, MLflow or trackio."""
