"""Smoke test of the private symbols: fails first when jax moves one."""

from __future__ import annotations

import inspect

import jax
import numpy as np
import pytest
from transfer_peers import free_port

from blitzjax.transfer import compat


def test_one_rank_world_runs_a_jit_on_its_own_client_beside_the_default_one() -> None:
    address = f"127.0.0.1:{free_port()}"
    service = compat.start_coordination_service(address, 1, 100.0)
    distributed = compat.connect_distributed(address, 0, 100.0, 300.0)
    try:
        client = compat.make_comm_client(distributed, 0, 1, "127.0.0.1", 3)
        assert len(client.devices()) == 3 and client is not jax.devices("cpu")[0].client
        compat.wait_for_ranks(distributed, "alone", [0], 100.0)
        with compat.without_persistent_cache():
            x = jax.device_put(np.ones(4, np.float32), client.devices()[1])
            assert float(jax.jit(lambda v: v.sum())(x)) == 4.0
        again = compat.make_comm_client(distributed, 0, 1, "127.0.0.1", 3)  # as after a restart of rank 0
        assert len(again.devices()) == 3
    finally:
        distributed.shutdown()
        service.shutdown()


def test_transfer_server_offers_poisons_and_resets() -> None:
    server = compat.start_transfer_server(jax.devices("cpu")[0].client, "127.0.0.1", 1, 1 << 20)
    server.await_pull(1, [jax.numpy.ones(3)])
    compat.drop_offers(server)
    connection = server.connect(f"127.0.0.1:{server.address().rsplit(':', 1)[1]}")
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    waiting = connection.pull(1, [jax.ShapeDtypeStruct((3,), np.float32, sharding=here)])
    compat.poison(connection)
    with pytest.raises(RuntimeError):
        waiting[0].block_until_ready()


def test_no_other_module_uses_private_symbols() -> None:
    root = inspect.getfile(compat).rsplit("/", 2)[0]
    from pathlib import Path

    private = [p for p in Path(root).rglob("*.py") if p.name != "compat.py"
               and any(word in p.read_text() for word in ("jax._src", "import jaxlib", "from jaxlib"))]
    assert private == []
