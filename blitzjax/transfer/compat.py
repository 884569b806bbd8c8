"""Every private jax and jaxlib symbol that blitzjax uses, and nothing else.

Checked with jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0 (Python 3.12); the smoke test
tests/transfer/test_compat.py fails first when an upgrade moves one of them. No other module may import `jax._src` or
`jaxlib`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TypeAlias

from jaxlib import _jax

from blitzjax.addresses import joined

_GLOBAL_TOPOLOGY_KEY = "cpu:global_topology/cpu"  # written once by rank 0 of a CPU client
_TOPOLOGY_TIMEOUT_MINUTES = 1  # a member that dies between connecting and making its client costs the others this long

ERRORS = (RuntimeError, ValueError)  # what the library raises when a peer is at fault: by status code, either

Service: TypeAlias = _jax.DistributedRuntimeService
Distributed: TypeAlias = _jax.DistributedRuntimeClient
Client: TypeAlias = _jax.Client
TransferServer: TypeAlias = _jax.TransferServer
TransferConnection: TypeAlias = _jax.TransferConnection


def start_coordination_service(address: str, size: int, heartbeat_s: float) -> Service:
    """The key-value store and membership of `size` ranks, served at `address` by this process until `shutdown()`.

    Recoverable: the death of a rank is no error for the others, and the rank may connect again.
    """
    return _jax.get_distributed_runtime_service(
        address, size, heartbeat_timeout=_whole(heartbeat_s), shutdown_timeout=1, recoverable=True)


def connect_distributed(address: str, rank: int, heartbeat_s: float, connect_timeout_s: float) -> Distributed:
    """Connects to the coordination service; blocks until all ranks have connected once.

    The library aborts this process if that takes longer than `connect_timeout_s`, and when the service dies later.
    """
    client = _jax.get_distributed_runtime_client(
        address, rank, init_timeout=_whole(connect_timeout_s), shutdown_timeout=1,
        heartbeat_timeout=_whole(heartbeat_s), shutdown_on_destruction=False, use_compression=True)
    client.connect()
    return client


def make_comm_client(distributed: Distributed, rank: int, size: int, host_ip: str, num_devices: int) -> Client:
    """A CPU client beside the process's default one, with `num_devices` virtual devices and gloo over `host_ip`.

    Blocks until all `size` ranks have published their devices. A rank 0 that joins again replaces the global topology
    that its predecessor left, which is the only key of a dead rank that the library refuses to overwrite.
    """
    from jaxlib import xla_client

    if rank == 0:
        distributed.key_value_delete(_GLOBAL_TOPOLOGY_KEY)
    return xla_client.make_cpu_client(
        asynchronous=True, distributed_client=distributed, node_id=rank, num_nodes=size, num_devices=num_devices,
        collectives=_jax.make_gloo_tcp_collectives(distributed_client=distributed, hostname=host_ip),
        get_local_topology_timeout_minutes=_TOPOLOGY_TIMEOUT_MINUTES,
        get_global_topology_timeout_minutes=_TOPOLOGY_TIMEOUT_MINUTES)


def wait_for_ranks(distributed: Distributed, name: str, ranks: Sequence[int], timeout_s: float) -> None:
    """A barrier of `ranks`; every `name` is good for one meeting. Raises one of ERRORS when somebody does not come."""
    distributed.wait_at_barrier(name, max(1, int(timeout_s * 1000)), process_ids=list(ranks))


def without_persistent_cache() -> contextlib.AbstractContextManager:
    """Compiles inside this block bypass jax's persistent cache, in this thread only.

    A cached multi-process CPU executable does not load in another process: its key holds the device assignment, but
    deserialising fails on the device ids.
    """
    from jax._src import config

    return config.enable_compilation_cache(False)


def start_transfer_server(client: Client, host_ip: str, streams: int, transfer_bytes: int) -> TransferServer:
    """A point-to-point array server at a free port of `host_ip`, moving `transfer_bytes` at a time.

    The transport addresses must be given: with the default empty list a pull by another process aborts this one.
    """
    import jax.experimental.transfer  # adds the Python methods to the extension classes

    return jax.experimental.transfer.start_transfer_server(
        client, joined(host_ip, 0), [joined(host_ip, 0)] * streams, transfer_size=transfer_bytes)


def poison(connection: TransferConnection) -> None:
    """Makes every pull that waits on `connection` fail now; the connection is useless afterwards."""
    connection._poison_connection()


def drop_offers(server: TransferServer) -> None:
    """Frees every array that `server` offers and nobody has pulled."""
    server._reset_rendevous_table()


def _whole(seconds: float) -> int:
    """The library counts whole seconds, at least one."""
    return max(1, round(seconds))
