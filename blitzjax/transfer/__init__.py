"""MOVES: parameters by multicast, activations and KV by hand-off. Knows plans, not policies."""
