"""An asyncio client's calls of Generate, in one Relay that opens with the first and again after it broke.

Invariant: a call ends as a Generate of its own would: with what the server says of it, or as the relay broke.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeAlias

import grpc

from blitzjax.serve.channels import MAX_REQUEST_BYTES
from blitzjax.serve.rejoin import FINAL_KEY, Server
from blitzjax.v1 import inference_pb2 as pb

_Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.RelayRequest, pb.RelayResponse]"


class Bundle:
    """Make and use it in one event loop. `relay` calls Relay, of whose initial metadata `server` hears."""

    def __init__(self, relay: Callable[[AsyncIterator[pb.RelayRequest]], _Call], server: Server):
        self._relay, self._server = relay, server
        self._open: _Open | None = None
        self._calls = 0

    async def generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncGenerator[pb.GenerateResponse]:
        """Closing it ends the call. Raises AioRpcError: with the initial metadata of the relay, if that broke."""
        if (size := request.ByteSize()) > MAX_REQUEST_BYTES:  # in a relay it would break the others, too
            raise _error("INVALID_ARGUMENT", f"the request has {size} bytes, more than {MAX_REQUEST_BYTES}", final=True)
        if self._open is None or self._open.over:
            self._open = _Open(self._relay, self._server)
        number, relay, loop = self._calls, self._open, asyncio.get_running_loop()
        self._calls += 1
        said = relay.begin(number, request)
        too_late = _error("DEADLINE_EXCEEDED", "Deadline Exceeded")
        late = None if timeout_s is None else loop.call_later(timeout_s, said.put_nowait, too_late)
        try:
            while True:
                match await said.get():
                    case grpc.aio.AioRpcError() as broken:
                        raise broken
                    case pb.Relayed(end=pb.CallEnd(code="")) as message:  # it has not ended
                        yield message.response
                    case pb.Relayed(end=pb.CallEnd(code="OK")):
                        return
                    case pb.Relayed() as message:
                        raise _error(message.end.code, message.end.message, final=True)
        finally:
            if late is not None:
                late.cancel()
            relay.leave(number)

    async def close(self) -> None:
        if self._open is not None:
            await self._open.close()


class _Open:
    """One relay, until it breaks."""

    def __init__(self, relay: Callable[[AsyncIterator[pb.RelayRequest]], _Call], server: Server):
        self.over = False
        self._server = server
        self._unsent: asyncio.Queue[pb.RelayRequest | None] = asyncio.Queue()  # None: no more
        self._said: dict[int, asyncio.Queue[pb.Relayed | grpc.aio.AioRpcError]] = {}  # of the calls that have not ended
        self._call = relay(self._requests())
        self._reading = asyncio.create_task(self._read())

    def begin(self, number: int, request: pb.GenerateRequest) -> asyncio.Queue[pb.Relayed | grpc.aio.AioRpcError]:
        """→ what will be said of the call."""
        said: asyncio.Queue[pb.Relayed | grpc.aio.AioRpcError] = asyncio.Queue()
        self._said[number] = said
        self._unsent.put_nowait(pb.RelayRequest(call=number, generate=request))
        return said

    def leave(self, number: int) -> None:
        """Nobody wants it any more. Abort says so, too, and waits until it is heard, but finds nothing that has not begun."""
        if self._said.pop(number, None) is not None:
            self._unsent.put_nowait(pb.RelayRequest(call=number))

    async def close(self) -> None:
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _requests(self) -> AsyncIterator[pb.RelayRequest]:
        while (request := await self._unsent.get()) is not None:
            yield request

    async def _read(self) -> None:
        broken = _error("UNAVAILABLE", "the relay ended")
        try:
            self._server.said(await self._call.initial_metadata())
            async for message in self._call:
                for said in message.said:
                    if (waiting := self._said.get(said.call)) is not None:
                        waiting.put_nowait(said)
                    if said.HasField("end"):
                        self._said.pop(said.call, None)
        except grpc.aio.AioRpcError as e:
            broken = e
        finally:
            self.over = True
            self._unsent.put_nowait(None)
            for waiting in self._said.values():
                waiting.put_nowait(broken)
            self._said = {}


def _error(code: str, message: str, final: bool = False) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((FINAL_KEY, "1")) if final else grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode[code], grpc.aio.Metadata(), trailing, message)
