"""The small networks of the distillation literature, written from their papers: one file each."""
