"""Point-to-point hand-off of arrays between any two processes: one side offers, the other takes.

It needs no world and no common order of operations. Nothing here waits for ever: the library's own pulls do (a dead
address, an offer that never comes, a stopped peer), so a watchdog breaks the connection when a `take` is overdue.

One taker must not be able to end all others: a server of the library (jaxlib 0.10.2, 0.12.0) has eight blocks through which
arrays leave, and what waits to be sent when its taker dies is never sent and never gives its block back. With all of them
lost, nothing leaves that server any more; a taker that hangs holds its threads as well. So whenever something did not
arrive it is tried whether arrays still pass, and if not, later offers are made by a new server.
"""

from __future__ import annotations

import collections
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import jax
import numpy as np

from blitzjax.addresses import joined
from blitzjax.errors import TransferError
from blitzjax.transfer import compat, staging

log = logging.getLogger(__name__)
_TRANSFER_BYTES = 4 << 20  # staging block; the library's default of 256 MiB reserves 6 GiB
_STREAMS = 2  # TCP connections per peer
_REMEMBERED_OFFERS = 1024  # sizes only, so that an offer can be withdrawn
_WITHDRAW_TIMEOUT_S = 1.0
_TRIAL_TIMEOUT_S = 1.0
_TRIAL_ARRAYS = 2 * _STREAMS  # so that every stream carries some


@dataclass(frozen=True)
class Offered:
    """Each of `uuids` is good for one take at `address` ("ip:port")."""

    address: str
    uuids: tuple[int, ...]


@dataclass(frozen=True)
class _Offer:
    server: compat.TransferServer
    specs: list[jax.ShapeDtypeStruct]


class HandOff:
    """A server for this process's arrays and connections to others, on the default client of `devices`; on the CPU's if
    they have memory of their own, and arrays are copied there and from there.

    Thread-safe. An offer is for one taker, and pins its arrays until taken or withdrawn: nobody tells the offering side
    whether an offer was taken, so the control plane must, and withdraw what nobody will claim.
    """

    def __init__(self, host_ip: str, devices: Sequence[jax.Device], own_memory: bool | None = None) -> None:
        """`own_memory`: see `staging.has_own_memory`; None: as that says."""
        staged = staging.has_own_memory(devices[0]) if own_memory is None else own_memory
        self._host = jax.local_devices(backend="cpu")[0] if staged else None
        self._sends_from = devices[0] if self._host is None else self._host
        self._host_ip = host_ip
        self._server = self._started()
        self._retired: compat.TransferServer | None = None  # what it still can send goes on
        self._on_trial = False
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="handoff-staging")
        self._staging: dict[int, Future[None]] = {}  # offers whose arrays are not on the host yet
        self._uuids = itertools.count(secrets.randbits(62))  # a stale uuid of a dead process never names a new offer
        self._offers: collections.OrderedDict[int, _Offer] = collections.OrderedDict()
        self._connections: dict[str, compat.TransferConnection] = {}
        self._lock = threading.Lock()
        self._watchdog = _Watchdog()

    def offer(self, *groups: Sequence[jax.Array]) -> Offered:
        """Makes the arrays of every group available to one `take`; they may be taken before they are computed."""
        with self._lock:
            server, uuids = self._server, tuple(next(self._uuids) for _ in groups)
            for uuid, arrays in zip(uuids, groups, strict=True):
                self._offers[uuid] = _Offer(server, [_spec(array) for array in arrays])
                if self._host is not None:
                    self._staging[uuid] = self._stager.submit(self._stage, server, uuid, list(arrays), self._host)
            while len(self._offers) > _REMEMBERED_OFFERS:
                self._offers.popitem(last=False)
        if self._host is None:
            for uuid, arrays in zip(uuids, groups, strict=True):
                server.await_pull(uuid, [part for array in arrays for part in staging.lowered(array, None)])
        return Offered(self._address(server), uuids)

    def _stage(self, server: compat.TransferServer, uuid: int, arrays: list[jax.Array], host: jax.Device) -> None:
        """In a thread of its own: takers may be early, and the offering side must not wait for copies."""
        try:
            server.await_pull(uuid, [part for array in arrays for part in staging.lowered(array, host)])
        except RuntimeError as e:
            log.warning("hand-off %d cannot be copied to the host, its taker will time out: %s", uuid, e)
        with self._lock:
            del self._staging[uuid]

    def take(self, address: str, uuid: int, specs: Sequence[jax.ShapeDtypeStruct],
             timeout_s: float) -> list[jax.Array]:
        """The arrays offered as `uuid` at `address`, with the shapes, dtypes and (local) shardings of `specs`.

        Blocks until the data is here. Raises TransferError after `timeout_s`, or at once when the peer dies; other
        takes from the same address that are under way fail with it, later ones connect afresh.
        """
        return self.take_all(address, [(uuid, specs)], timeout_s)[0] if specs else []

    def take_all(self, address: str, wanted: Sequence[tuple[int, Sequence[jax.ShapeDtypeStruct]]],
                 timeout_s: float) -> list[list[jax.Array]]:
        """Several offers of one address, each as for `take`: their ways there and back are one wait together."""
        connection = self._connection(address)
        try:
            return self._taken(connection, address, wanted, timeout_s)
        except TransferError:
            self._drop(address, connection)
            raise

    def _taken(self, connection: compat.TransferConnection, address: str,
               wanted: Sequence[tuple[int, Sequence[jax.ShapeDtypeStruct]]], timeout_s: float) -> list[list[jax.Array]]:
        with self._watchdog.guard(connection, timeout_s) as guard:
            try:
                return self._pulled(connection, wanted)
            except compat.ERRORS as e:
                compat.poison(connection)
                self._try_server()
                why = f"nothing came within {timeout_s:g} s" if guard.fired else str(e)
                uuids = ", ".join(str(uuid) for uuid, _ in wanted)
                raise TransferError(f"hand-off {uuids} from {address} failed: {why}") from e

    def _pulled(self, connection: compat.TransferConnection, wanted: Sequence[tuple[int, Sequence[jax.ShapeDtypeStruct]]]
                ) -> list[list[jax.Array]]:
        parts = [connection.pull(uuid, [part for spec in specs for part in staging.specs(spec, self._host)])
                 for uuid, specs in wanted]
        arriving = iter(jax.block_until_ready([part for some in parts for part in some]))
        return jax.block_until_ready([[staging.lifted(spec, arriving) for spec in specs] for _, specs in wanted])

    def withdraw(self, uuid: int) -> bool:
        """Frees an offer that nobody will take, by taking it ourselves. False if it was taken, or is being taken.

        The latter takes a second, for nothing tells such an offer from one that is still on its way, and a connection of
        its own, for a second in vain ends all that waits on the connection.
        """
        with self._lock:
            offer, copying = self._offers.pop(uuid, None), self._staging.get(uuid)
        if offer is None:
            return False
        if copying is not None:
            wait([copying])
        address = self._address(offer.server)
        try:
            self._taken(self._connected(address), address, [(uuid, offer.specs)], _WITHDRAW_TIMEOUT_S)
        except TransferError:
            return False
        return True

    def forget(self, uuids: Iterable[int]) -> None:
        """They were taken. Others' are ignored."""
        with self._lock:
            for uuid in uuids:
                self._offers.pop(uuid, None)

    def offers(self, uuid: int) -> bool:
        """Whether `uuid` was offered here and not withdrawn, taken or not."""
        with self._lock:
            return uuid in self._offers

    def _try_server(self) -> None:
        """Something did not arrive: whose fault was it? In a thread of its own."""
        with self._lock:
            if self._on_trial:
                return
            self._on_trial = True
        threading.Thread(target=self._trial, name="handoff-trial", daemon=True).start()

    def _trial(self) -> None:
        """The server sends to this process; if that does not arrive, another server makes the offers from now on."""
        try:
            if not self._passes(self._server):
                log.warning("what is handed off here does not arrive any more: a new server replaces that at %s",
                            self._address(self._server))
                self._replace_server()
        finally:
            self._on_trial = False

    def _passes(self, server: compat.TransferServer) -> bool:
        arrays = jax.device_put([np.zeros(1, np.float32)] * _TRIAL_ARRAYS, self._sends_from)
        uuid, address = next(self._uuids), self._address(server)
        server.await_pull(uuid, arrays)
        try:
            self._taken(self._connected(address), address, [(uuid, [_spec(a) for a in arrays])], _TRIAL_TIMEOUT_S)
        except TransferError:
            return False
        return True

    def _replace_server(self) -> None:
        """The old one is kept until the next falls: if it was only slow, it ends what it began."""
        fresh = self._started()
        with self._lock:
            dropped, self._retired, self._server = self._retired, self._server, fresh
            self._connections.clear()  # those that are in use live on
            if dropped is not None:
                compat.drop_offers(dropped)
                for uuid in [uuid for uuid, offer in self._offers.items() if offer.server is dropped]:
                    del self._offers[uuid]

    def _started(self) -> compat.TransferServer:
        return compat.start_transfer_server(self._sends_from.client, self._host_ip, _STREAMS, _TRANSFER_BYTES)

    def _address(self, server: compat.TransferServer) -> str:
        return joined(self._host_ip, int(server.address().rpartition(":")[2]))

    def _connection(self, address: str) -> compat.TransferConnection:
        with self._lock:
            if address not in self._connections:
                self._connections[address] = self._connected(address)
            return self._connections[address]

    def _connected(self, address: str) -> compat.TransferConnection:
        try:
            return self._server.connect(address)
        except compat.ERRORS as e:
            raise TransferError(f"cannot connect to {address}: {e}") from e

    def _drop(self, address: str, connection: compat.TransferConnection) -> None:
        with self._lock:
            if self._connections.get(address) is connection:
                del self._connections[address]


def _spec(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


class _Guard:
    """A take under way; `fired` once the watchdog has broken its connection."""

    def __init__(self, watchdog: _Watchdog, connection: compat.TransferConnection, deadline_s: float) -> None:
        self._watchdog = watchdog
        self.connection = connection
        self.deadline_s = deadline_s
        self.fired = False

    def __enter__(self) -> _Guard:
        self._watchdog.add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._watchdog.remove(self)


class _Watchdog:
    """Poisons connections whose takes are overdue. One thread, woken only by an earlier deadline than it waits for."""

    def __init__(self) -> None:
        self._guards: set[_Guard] = set()
        self._wakes_at_s = float("inf")
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="handoff-watchdog", daemon=True).start()

    def guard(self, connection: compat.TransferConnection, timeout_s: float) -> _Guard:
        return _Guard(self, connection, time.monotonic() + timeout_s)

    def add(self, guard: _Guard) -> None:
        with self._changed:
            self._guards.add(guard)
            if guard.deadline_s < self._wakes_at_s:
                self._changed.notify()

    def remove(self, guard: _Guard) -> None:
        with self._changed:
            self._guards.discard(guard)

    def _run(self) -> None:
        with self._changed:
            while True:
                now_s = time.monotonic()
                for guard in [g for g in self._guards if g.deadline_s <= now_s]:
                    self._guards.discard(guard)
                    guard.fired = True
                    compat.poison(guard.connection)
                self._wakes_at_s = min((g.deadline_s for g in self._guards), default=float("inf"))
                self._changed.wait(None if self._wakes_at_s == float("inf") else self._wakes_at_s - now_s)
