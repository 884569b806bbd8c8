"""The values of the tiny checkpoints in families.json; numpy only, so that both sides of a test can import it."""

from __future__ import annotations

import zlib

import numpy as np


def generator(case: str, name: str) -> np.random.Generator:
    """The one that draws this tensor."""
    return np.random.default_rng(zlib.crc32(f"{case} {name}".encode()))


def values(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 drawn from the name: norms and biases are far from 1 and 0, so that leaving any tensor out shows."""
    drawn = generator(case, name).standard_normal(shape, np.float32)
    if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
        return np.float32(0.3) * drawn + np.float32(not case.startswith("gemma"))  # gemma publishes scale - 1
    if name.endswith(("bias", "sinks")):
        return np.float32(0.3) * drawn
    if "embed" in name or "wte" in name or "wpe" in name:
        return drawn * np.float32(0.1 if case.startswith("gemma") else 0.5)  # gemma multiplies them by dim ** 0.5
    return drawn * np.float32(1.5 * shape[-1] ** -0.5)
