"""MXFP4 as gpt-oss publishes it: blocks of 32 four-bit floats that share a power of two.

OCP Microscaling Formats 1.0, section 5.3: E2M1 elements, E8M0 scales. A byte holds two elements, the first one low.
"""

from __future__ import annotations

import numpy as np

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ELEMENTS = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_BIAS = 127
BLOCK = 32  # elements


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8[*rows, n, 16], uint8[*rows, n] → float32[*rows, n * 32]"""
    pairs = np.stack([_ELEMENTS[blocks & 15], _ELEMENTS[blocks >> 4]], axis=-1)  # [*rows, n, 16, 2]
    exponents = scales.astype(np.int32)[..., None, None] - _BIAS
    return np.ldexp(pairs, exponents).reshape(*blocks.shape[:-2], -1)
