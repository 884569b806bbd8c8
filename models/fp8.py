"""Float8 weights as published: E4M3 numbers (arXiv:2209.05433), and scales of blocks, of rows or of the whole matrix.

Two ways to say it: `fp8`, with `weight_block_size` (DeepSeek-V3's, Qwen3-*-FP8) or of the whole; compressed-tensors, as
llm-compressor writes it (RedHatAI's *-FP8 and *-FP8-dynamic).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blitzjax.errors import CheckpointError
from blitzjax.models.config import Config

_BYTES = np.arange(128)  # of numbers that are not negative
_POSITIVE = np.ldexp((_BYTES & 7) + 8.0 * (_BYTES > 7), np.maximum(_BYTES >> 3, 1) - 10)
_POSITIVE[127] = np.nan  # there is no infinity
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE]).astype(np.float32)  # of every byte
_ROWS = 256  # that are dequantised at once


@dataclass(frozen=True, slots=True)
class FP8:
    """A packing (see packing.py) of matrices [out, in], of which each `block` has a scale; 0: all rows, all columns."""

    block: tuple[int, int]
    values_type: str = "F8_E4M3"
    values_suffix: str = ""
    scale_types: tuple[str, ...] = ("F32", "BF16", "F16")
    scale_suffixes: tuple[str, ...] = ("_scale_inv", "_scale")  # both multiply
    unused: tuple[str, ...] = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")

    def shape(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        return values if len(values) == 2 else None

    def scales_shapes(self, values: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        counts = tuple(-(-size // (side or size)) for size, side in zip(values, self.block, strict=True))
        return (counts, (1,), ()) if self.block == (0, 0) else (counts,)

    def dequantize(self, values: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Some rows at a time are in memory as float32."""
        (rows, columns), (tall, wide) = values.shape, self.block
        tall = tall or rows
        matrix, of_blocks = np.empty(values.shape, dtype), scales.astype(np.float32).reshape(-(-rows // tall), -1)
        for start in range(0, rows, _ROWS):
            some = slice(start, min(start + _ROWS, rows))
            factors = of_blocks[np.arange(some.start, some.stop) // tall]  # [rows, blocks in a row]
            matrix[some] = _NUMBERS[values[some].view(np.uint8)] * (factors.repeat(wide, 1)[:, :columns] if wide else factors)
        return matrix


def read(settings: Config) -> FP8:
    """Of `quant_method` fp8. Raises CheckpointError naming what is not supported."""
    settings.only("fmt", "e4m3")
    settings.only("activation_scheme", "dynamic", "static")
    settings.only("scale_fmt", "float")
    return FP8(_block(settings, "weight_block_size") if settings.get("weight_block_size") else (0, 0))


def read_groups(settings: Config) -> FP8:
    """Of `quant_method` compressed-tensors. Raises CheckpointError naming what is not supported."""
    settings.only("format", "float-quantized", "naive-quantized")
    Config(settings.get("sparsity_config", {}), f"{settings.where}: sparsity_config").only("format", "dense")
    settings.only("transform_config", {}, instead="none")
    found = {_of_group(Config(group.get("weights") or {}, f"{settings.where}: {name}: weights"))
             for name, group in settings.need("config_groups").items()}
    if len(found) != 1:
        raise CheckpointError(f"{settings.where}: config_groups share scales in {len(found)} ways; one is supported")
    return found.pop()


def _of_group(weights: Config) -> FP8:
    weights.only("type", "float")
    weights.only("num_bits", 8)
    weights.only("symmetric", True)
    match strategy := weights.need("strategy"):
        case "tensor":
            return FP8((0, 0), scale_suffixes=("_scale",))
        case "channel":
            return FP8((1, 0), scale_suffixes=("_scale",))
        case "block":
            return FP8(_block(weights, "block_structure"), scale_suffixes=("_scale",))
    raise CheckpointError(f"{weights.where}: strategy = {strategy!r} is not supported; supported: tensor, channel, block")


def _block(settings: Config, key: str) -> tuple[int, int]:
    match settings.need(key):
        case [int(tall), int(wide)] if min(tall, wide) > 0:
            return tall, wide
        case given:
            raise CheckpointError(f"{settings.where}: {key} = {given!r} is not a number of rows and one of columns")
