"""Teacher outputs kept on disk by (sample, view): nobody waits for the teacher twice."""
