"""A unit's arrays in the dtype that a model wants, whatever a checkpoint has: matrices in blocks of int8, or not.

A block's scale is the least power of two that leaves no number beyond 127; numbers are rounded to nearest even. Wherever
it is done it gives the same bits. Invariant: beside a unit's arrays only some of their rows are in memory as float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from blitzjax.engine.modules import ArrayInfo

_VALUES, _SCALES = ".values", ".scales"  # behind the matrix's name, see models/parameters.py
_BLOCKS = 4096  # that are float32 at once
_LEAST = -126  # exponent of the least scale that is no subnormal number


def fitted(infos: Sequence[ArrayInfo], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unsharded arrays by the names of `infos`: matrices that they want in int8 are rounded unless they come so, those
    that come in int8 and are not wanted so are multiplied out. Types of others are the caller's to cast.
    """
    shapes, made = {info.name: info.shape for info in infos}, dict(arrays)
    for name in shapes:
        stem = name.removesuffix(_VALUES)
        if name not in arrays and stem in arrays:
            made[name], made[stem + _SCALES] = _rounded(made.pop(stem), shapes[stem + _SCALES])
        elif name not in arrays and name + _VALUES in arrays:
            made[name] = _multiplied(made.pop(name + _VALUES), made.pop(name + _SCALES))
    return made


def _rounded(matrix: np.ndarray, blocks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """→ i8 of its shape, bf16[blocks]"""
    given = matrix.reshape(math.prod(blocks), -1)
    values, exponents = np.empty(given.shape, np.int8), np.empty(len(given), np.int32)
    for start in range(0, len(given), _BLOCKS):
        some = slice(start, start + _BLOCKS)
        exact = given[some].astype(np.float32)
        fraction, exponent = np.frexp(np.abs(exact).max(axis=1))
        exponents[some] = np.maximum(exponent - np.where(fraction <= 127 / 128, 7, 6), _LEAST)
        values[some] = np.rint(np.ldexp(exact, -exponents[some, None]))
    return values.reshape(matrix.shape), np.ldexp(np.float32(1), exponents).astype(ml_dtypes.bfloat16).reshape(blocks)


def _multiplied(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """→ bf16, which has these numbers"""
    blocks = values.reshape(*scales.shape, -1).astype(ml_dtypes.bfloat16)
    return (blocks * scales[..., None]).reshape(values.shape)
