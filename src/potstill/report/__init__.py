"""Reports from the files of runs: figures, text reports, model card, and the pages of runs and sweeps."""
