"""Speed as ratios: contestants take turns in one process, so that a noisy machine is fair to all of them."""
