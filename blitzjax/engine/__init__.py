"""COMPUTES: one instance's parameters, KV cache, compiled stages and step loop."""
