"""PRETENDS: a virtual clock and a table of costs around the control objects that the live cluster runs. Never jax."""
