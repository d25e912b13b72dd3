"""From a recipe to a run folder: plan, preflight, training of each stage, evaluation, comparison and verdict."""
