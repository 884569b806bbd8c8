"""MXFP4 as gpt-oss publishes it: blocks of 32 four-bit floats that share a power of two.

OCP Microscaling Formats 1.0, section 5.3: E2M1 elements, E8M0 scales. A byte holds two elements, the first one low.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ELEMENTS = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([np.tile(_ELEMENTS, 16), np.repeat(_ELEMENTS, 16)], axis=-1).view(np.uint64)[:, 0]  # of every byte
_BIAS = 127


@dataclass(frozen=True, slots=True)
class MXFP4:
    """A packing (see packing.py) of the matrices [E, in, out] of all experts: blocks [E, out, n, 16], scales [E, out, n]."""

    values_type: str = "U8"
    values_suffix: str = "_blocks"
    scale_types: tuple[str, ...] = ("U8",)
    scale_suffixes: tuple[str, ...] = ("_scales",)
    unused: tuple[str, ...] = ()

    def shape(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(values) != 4:
            return None
        experts, out, count, half = values
        return experts, count * half * 2, out

    def scales_shapes(self, values: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return values[:-1],

    def dequantize(self, values: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """A view, transposed; bfloat16 holds all of its numbers exactly. One expert is in memory as float32."""
        experts, out, count, half = values.shape
        matrices = np.empty((experts, out, count * half * 2), dtype)
        for matrix, blocks, powers in zip(matrices, values, scales, strict=True):
            numbers = _PAIRS[blocks].view(np.float32)  # [out, n, 32]
            matrix[...] = np.ldexp(numbers, powers.astype(np.int32)[..., None] - _BIAS).reshape(matrix.shape)
        return matrices.swapaxes(1, 2)
