"""DECIDES: pure, deterministic scheduling and scaling. No jax, no clock, no I/O."""
