"""Arrays travel as they are cut, through the host where devices have memory of their own: whole, sharded and replicated,
bit for bit."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from blitzjax.transfer import staging
from blitzjax.transfer.handoff import HandOff

CUTS = {"whole": P(), "first": P("tp"), "last": P(None, None, "tp")}


def placed(cut: str, devices: int, dtype: str = "bfloat16") -> jax.Array:
    values = jnp.asarray(np.random.default_rng(devices).standard_normal((4, 3, 8)), dtype)
    return jax.device_put(values, NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("tp",)), CUTS[cut]))


def spec(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_parts_join_to_what_they_were_cut_from(cut: str, devices: int) -> None:
    array, host = placed(cut, devices), jax.local_devices(backend="cpu")[0]
    parts = staging.lowered(array, host)
    assert len(parts) == (1 if cut == "whole" else devices), "what is replicated travels once"
    assert [(p.shape, p.dtype) for p in parts] == [(s.shape, s.dtype) for s in staging.specs(spec(array), host)]
    again = staging.lifted(spec(array), iter(parts))
    assert again.sharding == array.sharding and again.dtype == array.dtype
    for one, other in zip(again.addressable_shards, array.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)


@pytest.fixture(scope="module")
def handoff() -> HandOff:
    return HandOff("127.0.0.1", jax.devices()[:2], own_memory=True)


def test_an_offer_is_taken_once_or_withdrawn(handoff: HandOff, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[placed("whole", 2, "float32"), placed("last", 2), placed("first", 2)], [placed("whole", 1)]]
    offered = handoff.offer(*groups)
    for uuid, arrays in zip(offered.uuids, groups, strict=True):
        got = handoff.take(offered.address, uuid, [spec(a) for a in arrays], 60.0)
        for one, sent in zip(got, arrays, strict=True):
            assert one.sharding == sent.sharding
            np.testing.assert_array_equal(one, sent)
        assert handoff.offers(uuid) and not handoff.withdraw(uuid) and not handoff.offers(uuid)
    monkeypatch.setattr("blitzjax.transfer.handoff._WITHDRAW_TIMEOUT_S", 60.0)
    assert all(handoff.withdraw(uuid) for uuid in handoff.offer(*groups).uuids)


@pytest.mark.parametrize("sender_has_own", [True, False])
def test_sides_need_not_have_memory_of_the_same_kind(handoff: HandOff, sender_has_own: bool) -> None:
    """What one cuts and the other does not would arrive as something else."""
    shared = HandOff("127.0.0.1", jax.devices()[:2], own_memory=False)
    sender, taker = (handoff, shared) if sender_has_own else (shared, handoff)
    arrays = [placed(cut, 2) for cut in CUTS]
    offered = sender.offer(arrays)
    got = taker.take(offered.address, offered.uuids[0], [spec(a) for a in arrays], 60.0)
    for one, sent in zip(got, arrays, strict=True):
        assert one.sharding == sent.sharding
        np.testing.assert_array_equal(one, sent)


def test_a_withdrawal_in_vain_ends_no_other(handoff: HandOff) -> None:
    """It must not cut one short that frees something: that would stay in memory for ever."""
    array = placed("whole", 1)
    offered = handoff.offer([array], [array])
    uuids = offered.uuids
    for uuid in uuids:
        handoff.take(offered.address, uuid, [spec(array)], 60.0)
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(handoff.withdraw, uuids[0])
        time.sleep(0.3)
        began = time.monotonic()
        assert not handoff.withdraw(uuids[1]) and not first.result(60)
    assert time.monotonic() - began > 0.9
