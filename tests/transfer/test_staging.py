"""Arrays of devices with memory of their own travel through the host: whole, sharded and replicated, bit for bit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from blitzjax.errors import TransferError
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


def test_an_offer_is_taken_once_or_withdrawn(handoff: HandOff) -> None:
    arrays = [placed("whole", 2, "float32"), placed("last", 2), placed("first", 2)]
    uuid = handoff.offer(arrays)
    for got, sent in zip(handoff.take(handoff.address, uuid, [spec(a) for a in arrays], 10.0), arrays, strict=True):
        assert got.sharding == sent.sharding
        np.testing.assert_array_equal(got, sent)
    assert not handoff.withdraw(uuid)
    assert handoff.withdraw(handoff.offer(arrays))


def test_a_withdrawal_in_vain_ends_no_other(handoff: HandOff) -> None:
    """It must not cut one short that frees something: that would stay in memory for ever."""
    array = placed("whole", 1)
    uuids = [handoff.offer([array]) for _ in range(2)]
    for uuid in uuids:
        handoff.take(handoff.address, uuid, [spec(array)], 10.0)
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(handoff.withdraw, uuids[0])
        time.sleep(0.3)
        began = time.monotonic()
        assert not handoff.withdraw(uuids[1]) and not first.result(5)
    assert time.monotonic() - began > 0.9


def test_what_was_reset_while_it_was_copied_is_never_offered(handoff: HandOff, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, lowered, array = threading.Event(), threading.Event(), staging.lowered, placed("whole", 1)

    def slow(array: jax.Array, host: jax.Device) -> list[jax.Array]:
        begun.set()
        assert go_on.wait(10)
        return lowered(array, host)

    monkeypatch.setattr(staging, "lowered", slow)
    uuid = handoff.offer([array])
    assert begun.wait(10)
    handoff.reset()
    go_on.set()
    with pytest.raises(TransferError):
        handoff.take(handoff.address, uuid, [spec(array)], 1.0)
