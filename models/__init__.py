"""Flax NNX decoders. Knows nothing of serving; `FAMILIES` maps a ModelSpec's family to its module."""
