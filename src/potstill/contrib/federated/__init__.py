"""Federated distillation: clients keep their images, the server holds student and teacher."""
