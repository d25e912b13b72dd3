"""Between the networks and a method: which layers are read, what is shown of them, and teachers asked as one."""
