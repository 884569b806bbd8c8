"""The controller's session with one worker: redials for ever, never blocks the brain, notices a lost worker.

Invariant: every InstanceJoined that a link reports is followed by `lost` before the next session of that link begins. A
session whose connection broke, or that the last controller left behind, is resumed, and if it cannot be, `lost` as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from blitzjax import events, types
from blitzjax.serve import codec
from blitzjax.serve.channels import TO_WORKER
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

_log = logging.getLogger("blitzjax.controller")
_REDIAL_S = 0.2
_RESUME_S = 1.0  # from a broken connection to the next one that works; a dead worker refuses that at once
_REFUSED_REDIAL_S = 5.0  # the worker needs an operator first
_MAX_UNSENT = 4096  # commands; a worker that lets so many pile up is as good as lost


class Shell(Protocol):
    """What a link reports to; each call returns at once. The controller is one, tests may be another."""

    def heard(self, instance: types.InstanceId, count: int) -> None:
        """What comes next is the `count`-th message of the session."""

    def on_event(self, event: events.Event) -> None: ...

    def on_tokens(self, instance: types.InstanceId, said: pb.Tokens | pb.Decoded) -> None: ...

    def on_refused(self, instance: types.InstanceId, message: str, model: str = "") -> None: ...

    def on_lost(self, instance: types.InstanceId, reason: str) -> None: ...

    def flush(self) -> None:
        """Writes down all that was heard."""

    def now(self) -> float: ...


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a link must know to resume its session."""

    joined: bool
    sessions: int
    received: int
    sent: int
    unconfirmed: tuple[bytes, ...]


class WorkerLink:
    """One worker address. Owned by the controller; `run` is its only task."""

    def __init__(self, address: str, configure: pb.Configure, shell: Shell):
        self.instance = configure.instance
        self.address = address
        self.joined = False
        self.refused = ""  # why the worker cannot serve, until a session works
        self.received = 0  # messages of this session
        self._journal, self._since = "", 0.0
        self._sessions = 0  # that began
        self._sent = 0  # commands of this session
        self._unconfirmed: deque[pb.WorkerCommand] = deque()  # the last of them: the worker may not have them
        self._open = False  # the worker listens to this session
        self._broken = False  # only the connection ended
        self._patience: asyncio.Timeout  # with a worker that has not answered this connection
        self._confirmed = 0  # messages that the worker knows to be written down
        self.configure = configure  # the next session begins with it
        self._shell = shell
        self._unsent: asyncio.Queue[pb.WorkerCommand] | None = None
        self._call: grpc.aio.StreamStreamCall  # of the session

    def send(self, command: pb.WorkerCommand) -> None:
        """Queues a command; without a session it is dropped, for InstanceLost then tells the brain."""
        if not self.joined:
            return
        self._sent += 1
        self._unconfirmed.append(command)
        if self._open:
            self._put(command)

    def outlive(self, journal: str, since: float) -> None:
        """Sessions may be resumed by a controller that goes on with `journal`; this one began `since`."""
        self._journal, self._since = journal, since

    def confirm(self) -> None:
        """All that was received is written down: the worker need not keep it."""
        if self._journal and self._open and self.received > self._confirmed:
            self._confirmed = self.received
            self._put(pb.WorkerCommand(received=self.received))

    def begin(self) -> None:
        """The worker joined in a new session."""
        self.joined, self.refused = True, ""
        self._sessions += 1
        self._sent = 0
        self._unconfirmed.clear()

    def state(self) -> LinkState:
        return LinkState(self.joined, self._sessions, self.received, self._sent,
                         tuple(command.SerializeToString() for command in self._unconfirmed))

    def restore(self, state: LinkState) -> None:
        self.joined, self._sessions, self.received, self._sent = (
            state.joined, state.sessions, state.received, state.sent)
        self._unconfirmed = deque(map(pb.WorkerCommand.FromString, state.unconfirmed))

    def _put(self, command: pb.WorkerCommand) -> None:
        assert self._unsent is not None
        try:
            self._unsent.put_nowait(command)
        except asyncio.QueueFull:
            _log.error("%s at %s does not read its commands; dropping the session", self.instance, self.address)
            self._call.cancel()

    async def run(self) -> None:
        """Holds a session until cancelled."""
        while True:
            reason = await self._connection(None)
            while self._broken:
                _log.warning("the connection to %s broke: %s", self.instance, reason)
                self._shell.flush()  # the worker forgets what it hears was received
                reason = await self._connection(_RESUME_S)
            self._lost(reason)
            await asyncio.sleep(_REFUSED_REDIAL_S if self.refused else _REDIAL_S)

    async def _connection(self, patience_s: float | None) -> str:
        """From dial to end; returns why it ended. `_broken` afterwards says whether the session may go on with another;
        `patience_s` is how long the worker may take to answer.
        """
        try:
            async with asyncio.timeout(patience_s) as self._patience:
                reason = await self._session()
        except TimeoutError:
            reason = f"the worker has not answered for {patience_s:g} s"
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # gRPC keeps it to itself while it sends what a call begins with
        return reason

    async def _session(self) -> str:
        self._broken = False
        configure = self._next_configure()
        async with grpc.aio.insecure_channel(self.address, options=TO_WORKER) as channel:
            self._call = rpc.WorkerStub(channel).Run()
            try:
                await self._call.write(pb.WorkerCommand(configure=configure))
                async with self._writer(self._call):
                    async for event in self._call:
                        self._receive(event)
                return "the worker ended its session"
            except grpc.aio.AioRpcError as e:
                return f"{e.code().name}: {e.details()}"
            except asyncio.InvalidStateError:  # write after the call ended
                return f"{await self._call.code()}: {await self._call.details()}"
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                self._broken = False
                return "the session was dropped"  # by us

    @contextlib.asynccontextmanager
    async def _writer(self, call: grpc.aio.StreamStreamCall) -> AsyncIterator[None]:
        self._unsent = asyncio.Queue(_MAX_UNSENT)
        task = asyncio.create_task(_write(call, self._unsent), name=f"write {self.instance}")
        try:
            yield
        finally:
            self._broken = self._open and self.joined and bool(self._journal)
            self._unsent, self._open = None, False
            task.cancel()

    def _next_configure(self) -> pb.Configure:
        """For a new session; the one that the last controller left is resumed instead."""
        configure = pb.Configure()
        configure.CopyFrom(self.configure)
        configure.resume, configure.since = self.joined, self._since
        if self._journal:
            configure.session = f"{self._journal}/{self._sessions + (not self.joined)}"
        self.received = configure.received = self.received if self.joined else 0
        self._confirmed = self.received
        return configure

    def _receive(self, message: pb.WorkerEvent) -> None:
        which = message.WhichOneof("event")
        if which == "resumed":
            self._resumed(message.resumed.taken)
            return
        if which == "instance_joined" and self.joined:
            self._lost("it does not know its session any more")
            self._call.cancel()
            return
        self.received += 1
        self._forget(message.taken)
        self._shell.heard(self.instance, self.received)
        match which:
            case "tokens" | "decoded":
                self._shell.on_tokens(self.instance, getattr(message, which))
            case "refused" if message.refused.model:  # the session goes on without it
                self._shell.on_refused(self.instance, message.refused.message, message.refused.model)
            case "refused":
                self.refused = message.refused.message or "no reason given"
                self._shell.on_refused(self.instance, self.refused)
            case "hand_off" | "borrow" | None:
                _log.error("%s sent the controller a message meant for its live partner", self.instance)
            case _:
                self._report(replace(codec.decode_event(message), at=self._shell.now()))

    def _report(self, event: events.Event) -> None:
        """A session begins with InstanceJoined; what comes after the loss of an instance is dropped."""
        if isinstance(event, events.InstanceJoined):
            self.begin()
            self._answered()
        if self.joined:
            self._shell.on_event(event)

    def _resumed(self, taken: int) -> None:
        """The last controller's session goes on: what the worker lacks of it is sent again."""
        oldest = self._sent - len(self._unconfirmed)
        if not self.joined or not oldest <= taken <= self._sent:
            _log.error("%s has obeyed %d commands, of %d to %d", self.instance, taken, oldest, self._sent)
            self._call.cancel()
            return
        _log.info("%s resumes its session: %d commands again", self.instance, self._sent - taken)
        self._forget(taken)
        self._answered()
        for command in self._unconfirmed:
            self._put(command)

    def _answered(self) -> None:
        self._open = True
        self._patience.reschedule(None)

    def _forget(self, taken: int) -> None:
        """The worker has obeyed its first `taken` commands."""
        while self._unconfirmed and self._sent - len(self._unconfirmed) < taken:
            self._unconfirmed.popleft()

    def _lost(self, reason: str) -> None:
        if self.joined:
            self.joined = False
            self._shell.on_lost(self.instance, reason)


async def _write(call: grpc.aio.StreamStreamCall, unsent: asyncio.Queue[pb.WorkerCommand]) -> None:
    try:
        while True:
            await call.write(await unsent.get())
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the reader learns why
