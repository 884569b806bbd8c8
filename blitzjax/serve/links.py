"""The controller's session with one worker: redials for ever, never blocks the brain, notices a lost worker.

Invariant: every InstanceJoined that a link reports is followed by `lost` before the next session of that link.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import grpc

from blitzjax import types
from blitzjax.serve import codec
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

_log = logging.getLogger("blitzjax.controller")
_REDIAL_S = 0.2
_REFUSED_REDIAL_S = 5.0  # the worker needs an operator first
_MAX_UNSENT = 4096  # commands; a worker that lets so many pile up is as good as lost
_PING_MS = 4000

CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # each dial connects afresh, without another channel's backoff
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PING_MS),
    ("grpc.http2.ping_timeout_ms", _PING_MS),  # the keepalive timeout alone does not end the connection
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

# A worker's server must allow the pings above, else it ends the connection with "too many pings".
WORKER_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 4),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # two workers on one port is a mistake, not a pair
)


class Shell(Protocol):
    """What a link reports to; each call returns at once. The controller is one, tests may be another."""

    def on_event(self, event: types.Event) -> None: ...

    def on_tokens(self, instance: types.InstanceId, tokens: pb.Tokens) -> None: ...

    def on_refused(self, instance: types.InstanceId, message: str, model: str = "") -> None: ...

    def on_lost(self, instance: types.InstanceId, reason: str) -> None: ...

    def now(self) -> float: ...


class WorkerLink:
    """One worker address. Owned by the controller; `run` is its only task."""

    def __init__(self, address: str, configure: pb.Configure, shell: Shell):
        self.instance = configure.instance
        self.address = address
        self.joined = False
        self.refused = ""  # why the worker cannot serve, until a session works
        self.configure = configure  # the next session begins with it
        self._shell = shell
        self._unsent: asyncio.Queue[pb.WorkerCommand] | None = None
        self._call: grpc.aio.StreamStreamCall | None = None
        self._early: list[types.Event] = []  # came before InstanceJoined

    def send(self, command: pb.WorkerCommand) -> None:
        """Queues a command; without a session it is dropped, for InstanceLost then tells the brain."""
        if self._unsent is None:
            return
        try:
            self._unsent.put_nowait(command)
        except asyncio.QueueFull:
            _log.error("%s at %s does not read its commands; dropping the session", self.instance, self.address)
            self._call.cancel()

    async def run(self) -> None:
        """Holds a session until cancelled."""
        while True:
            reason = await self._session()
            if self.joined:
                self.joined = False
                self._shell.on_lost(self.instance, reason)
            await asyncio.sleep(_REFUSED_REDIAL_S if self.refused else _REDIAL_S)

    async def _session(self) -> str:
        """One connection from dial to end; returns why it ended."""
        self._early.clear()
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            self._call = rpc.WorkerStub(channel).Run()
            try:
                await self._call.write(pb.WorkerCommand(configure=self.configure))
                async with self._writer(self._call):
                    async for event in self._call:
                        self._receive(event)
                return "the worker ended its session"
            except grpc.aio.AioRpcError as e:
                return f"{e.code().name}: {e.details()}"
            except asyncio.InvalidStateError:  # write after the call ended
                return f"{await self._call.code()}: {await self._call.details()}"
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
                return "the session was dropped"  # by `send`

    @contextlib.asynccontextmanager
    async def _writer(self, call: grpc.aio.StreamStreamCall) -> AsyncIterator[None]:
        self._unsent = asyncio.Queue(_MAX_UNSENT)
        task = asyncio.create_task(_write(call, self._unsent), name=f"write {self.instance}")
        try:
            yield
        finally:
            self._unsent = None
            task.cancel()

    def _receive(self, message: pb.WorkerEvent) -> None:
        match message.WhichOneof("event"):
            case "tokens":
                self._shell.on_tokens(self.instance, message.tokens)
            case "refused" if message.refused.model:  # the session goes on without it
                self._shell.on_refused(self.instance, message.refused.message, message.refused.model)
            case "refused":
                self.refused = message.refused.message or "no reason given"
                self._shell.on_refused(self.instance, self.refused)
            case "hand_off" | "borrow" | None:
                _log.error("%s sent the controller a message meant for its live partner", self.instance)
            case _:
                self._report(replace(codec.decode_event(message), at=self._shell.now()))

    def _report(self, event: types.Event) -> None:
        """The brain hears of an instance first through InstanceJoined; what came earlier follows it."""
        if isinstance(event, types.InstanceJoined):
            self.joined, self.refused = True, ""
            early, self._early = self._early, []
            for item in (event, *early):
                self._shell.on_event(item)
        elif self.joined:
            self._shell.on_event(event)
        else:
            self._early.append(event)


async def _write(call: grpc.aio.StreamStreamCall, unsent: asyncio.Queue[pb.WorkerCommand]) -> None:
    try:
        while True:
            await call.write(await unsent.get())
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the reader learns why
