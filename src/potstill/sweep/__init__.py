"""A search over a recipe's settings: one Optuna study that any number of processes work on."""
