"""The processes of a distributed run, on one machine or several, started by torchrun."""
