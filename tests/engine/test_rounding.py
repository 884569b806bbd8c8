"""Matrices in blocks of int8 are as near as they can be to what a checkpoint has, and the same wherever they are made."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from blitzjax.engine.checkpoint import Checkpoint, with_dtype
from blitzjax.engine.convert import TINY, random_unit, write_random
from blitzjax.engine.modules import ArrayInfo
from blitzjax.engine.params import LayerStore, unit_arrays
from blitzjax.engine.rounding import fitted
from blitzjax.errors import CheckpointError

BF16, INT8 = replace(TINY, dtype="bfloat16"), replace(TINY, dtype="int8")
SHAPE, BLOCKS = (3, 5, 64), (3, 5, 2)
WANTED = (ArrayInfo("w.scales", BLOCKS, np.dtype(ml_dtypes.bfloat16), (None,) * 3),
          ArrayInfo("w.values", SHAPE, np.dtype(np.int8), (None,) * 3))
PLAIN = (ArrayInfo("w", SHAPE, np.dtype(ml_dtypes.bfloat16), (None,) * 3),)


def loaded(path: Path, dtype: str) -> LayerStore:
    checkpoint = Checkpoint.open(path)
    store = LayerStore(with_dtype(checkpoint.spec, dtype), jax.devices()[:1])
    for unit in range(store.spec.units):
        checkpoint.load_unit(unit, store)
    return store


def digests(store: LayerStore) -> list[str]:
    return [hashlib.sha256(store.slab(unit, 0)).hexdigest() for unit in range(store.units)]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_block_has_the_least_power_of_two_that_its_largest_number_allows(size: float) -> None:
    w = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32) * np.float32(size)
    w[0, 0] = 0
    w[1, 0, :32] = np.linspace(-127, 127, 32).round() * 2.0**-3  # as it is
    w[1, 1, 0] = 2 * np.abs(w[1, 1]).max() * 128 / 127
    made = fitted(WANTED, {"w": w})
    values, scales = made["w.values"].reshape(*BLOCKS, 32), made["w.scales"].astype(np.float64)
    assert np.array_equal(np.exp2(np.log2(scales).round()), scales)
    largest = np.abs(w.reshape(*BLOCKS, 32)).max(-1)
    assert (largest <= 127 * scales).all() and (largest[largest > 0] > 63.5 * scales[largest > 0]).all()
    assert (np.abs(values * scales[..., None] - w.reshape(*BLOCKS, 32)) <= scales[..., None] / 2).all()
    np.testing.assert_array_equal(values[1, 0, 0] * scales[1, 0, 0], w[1, 0, :32])
    again = fitted(WANTED, fitted(PLAIN, made))
    assert all(np.array_equal(again[name], made[name]) for name in made)
    assert fitted(WANTED, made).keys() == {"w.values", "w.scales"}


def test_whoever_rounds_gets_the_same_bytes(tmp_path: Path) -> None:
    write_random(tmp_path / "int8", INT8, seed=5)
    write_random(tmp_path / "float32", TINY, seed=5)
    assert digests(loaded(tmp_path / "int8", "int8")) == digests(loaded(tmp_path / "float32", "int8"))
    sizes = [(tmp_path / dtype / "weights.bin").stat().st_size for dtype in ("int8", "float32")]
    assert sizes[0] < 0.4 * sizes[1]


def test_a_checkpoint_in_int8_serves_in_other_dtypes_what_it_has(tmp_path: Path) -> None:
    write_random(tmp_path / "int8", INT8, seed=5)
    restored = loaded(tmp_path / "int8", "float32")
    rounded = fitted(unit_arrays(INT8, 0), random_unit(INT8, 0, seed=5))
    wanted = fitted(unit_arrays(BF16, 0), rounded)
    assert not np.array_equal(wanted["qkv"], random_unit(INT8, 0, seed=5)["qkv"])
    for name, array in restored.params(0).items():
        np.testing.assert_array_equal(np.asarray(array), wanted[name].astype(np.float32))
    assert digests(loaded(tmp_path / "int8", "int8")) != digests(restored)


def test_embedding_head_and_what_is_small_keep_their_numbers() -> None:
    dtypes = {info.name: info.dtype.name for unit in (0, INT8.embed_unit, INT8.head_unit) for info in unit_arrays(INT8, unit)}
    assert dtypes == {"attn_norm": "float32", "ffn_norm": "float32", "norm": "float32", "table": "bfloat16"} | {
        f"{name}.{part}": dtype for name in ("qkv", "o", "gate_up", "down")
        for part, dtype in (("values", "int8"), ("scales", "bfloat16"))}


def test_ones_own_model_in_int8_is_refused() -> None:
    with pytest.raises(CheckpointError, match="int8 is for the built-in families; package.module:build takes"):
        with_dtype(replace(TINY, family="package.module:build"), "int8")
