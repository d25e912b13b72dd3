"""Feature maps: the stages of networks, hooks, pairing and adapters. Depends on torch only."""
