"""From a recipe to a run folder: plan, preflight checks, training of each stage, evaluation, comparison, verdict."""
