"""Slabs and arrays: layout, sharding, aliasing, order of commits. Runs on several CPU devices (tests/conftest.py)."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from blitzjax.engine import modules
from blitzjax.engine.convert import TINY, random_unit
from blitzjax.engine.params import (ALIGNMENT_BYTES, LayerStore, ShardingRules, fill, layout, model_bytes, unit_arrays,
                                    unit_bytes, unit_kind, unit_name)
from blitzjax.transfer.departures import Departures
from blitzjax.transfer.pieces import Trailer, chunk_size, cut
from blitzjax.types import ModelSpec

BF16 = replace(TINY, dtype="bfloat16")
UNEVEN = replace(TINY, heads=9, kv_heads=3)  # as SmolLM2: three KV heads do not divide by two


def loaded(spec: ModelSpec, tp: int, own_memory: bool | None = None) -> LayerStore:
    store = LayerStore(spec, jax.devices()[:tp], own_memory)
    for unit in range(spec.units):
        fill(store, unit, random_unit(spec, unit, seed=3))
        store.commit(unit)
    return store


def test_units_are_layers_embedding_head() -> None:
    assert [unit_kind(TINY, u) for u in range(TINY.units)] == ["layer"] * 4 + ["embed", "head"]
    assert [unit_name(TINY, u) for u in (0, 3, 4, 5)] == ["layer 0", "layer 3", "embed", "head"]
    names = {a.name for a in unit_arrays(TINY, 1)}
    assert names == {"attn_norm", "qkv", "o", "ffn_norm", "gate_up", "down"}
    assert [a.name for a in unit_arrays(TINY, 5)] == ["norm"]
    assert {a.name for a in unit_arrays(replace(TINY, tied_embeddings=False), 5)} == {"norm", "w"}


def test_model_bytes_counts_every_parameter() -> None:
    layer = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 128  # weights of one layer
    assert model_bytes(BF16) == 2 * (272 * 64 + 4 * layer) + 4 * 64 * 9  # norms stay float32
    assert model_bytes(BF16) == sum(unit_bytes(BF16, u) for u in range(BF16.units))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("spec", [TINY, BF16, UNEVEN], ids=["f32", "bf16", "uneven"])
def test_arrays_are_aligned_and_do_not_overlap(spec: ModelSpec, tp: int) -> None:
    for unit in range(spec.units):
        unit_layout, end = layout(spec, unit, tp), 0
        for info, shape, offset in zip(unit_layout.arrays, unit_layout.local_shapes, unit_layout.offsets, strict=True):
            assert offset % ALIGNMENT_BYTES == 0
            assert offset >= end
            end = offset + int(np.prod(shape)) * info.dtype.itemsize
        assert unit_layout.slab_bytes >= end
        assert unit_layout.slab_bytes % ALIGNMENT_BYTES == 0


def test_indivisible_axis_is_replicated_and_the_others_are_not() -> None:
    rules = ShardingRules(2)
    split = {a.name: rules.dimension(a) for a in unit_arrays(UNEVEN, 1)}
    assert split == {"attn_norm": None, "qkv": None, "o": None, "ffn_norm": None, "gate_up": 0, "down": 1}
    even = {a.name: rules.dimension(a) for a in unit_arrays(TINY, 1)}
    assert even == split | {"qkv": 0, "o": 1}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("spec", [TINY, BF16, UNEVEN], ids=["f32", "bf16", "uneven"])
def test_committed_arrays_hold_what_was_filled(spec: ModelSpec, tp: int) -> None:
    store = loaded(spec, tp)
    for unit in range(spec.units):
        wanted = random_unit(spec, unit, seed=3)
        for info in unit_arrays(spec, unit):
            array = store.params(unit)[info.name]
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            np.testing.assert_array_equal(np.asarray(array), wanted[info.name].astype(info.dtype))


@pytest.mark.parametrize("tp", [1, 2])
def test_committed_arrays_alias_their_slabs_on_cpu(tp: int) -> None:
    store = loaded(BF16, tp)
    for unit in range(BF16.units):
        for array in store.params(unit).values():
            for shard in array.addressable_shards:
                slab = store.slab(unit, shard.device.id)
                offset = shard.data.unsafe_buffer_pointer() - slab.ctypes.data
                assert 0 <= offset <= slab.nbytes - shard.data.nbytes


def test_arrays_outlive_release() -> None:
    store = loaded(TINY, 1)
    kept, wanted = store.params(1)["down"], random_unit(TINY, 1, seed=3)["down"]
    store.release()
    gc.collect()
    np.testing.assert_array_equal(np.asarray(kept), wanted)
    assert store.units == 0


def test_store_can_be_filled_again_after_release() -> None:
    store = loaded(TINY, 2)
    before = store.checksum(1, 0)
    store.release()
    fill(store, 0, random_unit(TINY, 0, seed=4))
    store.commit(0)
    fill(store, 1, random_unit(TINY, 1, seed=4))
    store.commit(1)
    assert store.checksum(1, 0) != before


def test_units_are_committed_in_order_and_read_when_loaded() -> None:
    store = LayerStore(TINY, jax.devices()[:1])
    with pytest.raises(AssertionError, match="unit 0 is next"):
        store.commit(1)
    with pytest.raises(AssertionError, match="not loaded"):
        store.params(0)
    store.commit(0)
    assert store.units == 1
    with pytest.raises(AssertionError, match="unit 1 is next"):
        store.commit(0)


def test_equal_slabs_have_equal_checksums() -> None:
    one, two = loaded(TINY, 2), loaded(TINY, 2)
    for unit in range(TINY.units):
        for lane in range(2):
            assert one.checksum(unit, lane) == two.checksum(unit, lane)
    assert one.checksum(1, 0) != one.checksum(1, 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_devices_with_memory_of_their_own_leave_none_of_the_hosts(tp: int) -> None:
    """As on a GPU: arrays are copies, slabs are gone, and come back byte for byte, two units at a time."""
    shared, own = loaded(BF16, tp), loaded(BF16, tp, own_memory=True)
    assert own.held_bytes == 0 < shared.held_bytes
    for unit in range(BF16.units):
        for lane in range(tp):
            assert own.checksum(unit, lane) == shared.checksum(unit, lane)
    assert own.held_bytes == 0, "checksums are remembered"
    for unit in range(BF16.units):
        for name, array in own.params(unit).items():
            np.testing.assert_array_equal(np.asarray(array), np.asarray(shared.params(unit)[name]))
        for lane in range(tp):
            np.testing.assert_array_equal(own.slab(unit, lane), shared.slab(unit, lane))
        assert own.held_bytes <= tp * sum(sorted(map(own.slab_bytes, range(BF16.units)))[-2:])
    own.release()
    assert own.held_bytes == own.units == 0


def test_a_host_copy_of_dropped_slabs_is_whole_and_can_be_used_again() -> None:
    shared, own = loaded(BF16, 1), loaded(BF16, 1, own_memory=True)
    own.keep()
    assert own.is_copy and own.held_bytes == shared.held_bytes
    own.use()
    assert own.held_bytes == 0 and not own.is_copy
    for unit in range(BF16.units):
        for name, array in own.params(unit).items():
            np.testing.assert_array_equal(np.asarray(array), np.asarray(shared.params(unit)[name]))
        np.testing.assert_array_equal(own.slab(unit, 0), shared.slab(unit, 0))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_multicast_sends_the_same_bytes_from_the_devices(tp: int) -> None:
    sent = []
    for store in (loaded(BF16, tp), loaded(BF16, tp, own_memory=True)):
        chunk = chunk_size(store.slab_bytes(0), 4096)
        pieces = cut(store, 0, BF16.units, chunk)
        departures = Departures(store, pieces, chunk)
        sent.append([[(c[:piece.payload].tobytes(), Trailer.read(c) if piece.last else None)
                      for c in departures.chunks(piece, end=False)] for piece in pieces])
        departures.close()
    assert len(sent[0]) > BF16.units and sent[0] == sent[1]


def test_what_a_model_holds_is_listed_once_and_then_known_without_flax(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLITZJAX_CACHE", str(tmp_path))
    modules.kind_arrays.cache_clear()
    listed = [unit_arrays(TINY, unit) for unit in range(TINY.units)]
    again = ("import sys; from blitzjax.serve import node; from blitzjax.engine.params import unit_arrays; "
             "from blitzjax.types import ModelSpec\n"
             f"print([unit_arrays({TINY!r}, unit) for unit in range({TINY.units})], 'flax' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True).stdout
    assert said == f"{listed} False\n"
    for file in (tmp_path / "arrays").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    modules.kind_arrays.cache_clear()
    assert [unit_arrays(TINY, unit) for unit in range(TINY.units)] == listed
