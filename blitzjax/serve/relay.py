"""Many calls of Generate in one, as their caller wants it: who streams 100 answers gets a message a step, not 100.

Invariant: each call that began ends, with what its answers said before it, unless its caller left it; where the relay
itself ends early, each of its calls is a broken Generate: who has a key may come back for the answers.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from blitzjax.errors import BlitzError, InvalidRequest, brief
from blitzjax.serve.answers import Answer
from blitzjax.serve.streams import begin, response, taken, tell_progress
from blitzjax.v1 import inference_pb2 as pb

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller
    from blitzjax.serve.model import ServedModel

_log = logging.getLogger("blitzjax.controller")


@dataclass(slots=True)
class _Call:
    """Whose answers are on their way."""

    answers: tuple[Answer, ...]
    left: list[Answer]  # those that have not ended
    model: ServedModel
    key: str


class Relay:
    """One caller's. `write` sends it a message."""

    def __init__(self, controller: Controller, write: Callable[[pb.RelayResponse], Awaitable[None]]):
        self._controller, self._write = controller, write
        self._changed: asyncio.Event  # there is something to say
        self._beginning: dict[int, asyncio.Task[None]] = {}
        self._calls: dict[int, _Call] = {}
        self._ready: dict[int, None] = {}  # calls with something to say, in that order
        self._out: list[pb.Relayed] = []  # to be said before that

    async def run(self, requests: AsyncIterator[pb.RelayRequest]) -> None:
        """Until there are no more requests, and each has its end. Raises InvalidRequest for a number that had a call,
        Unavailable at shutdown.
        """
        with self._controller.subscribe() as self._changed:
            reading = asyncio.create_task(self._read(requests))
            reading.add_done_callback(lambda _: self._changed.set())
            try:
                while not reading.done() or self._beginning or self._calls or self._out:
                    await self._changed.wait()
                    self._changed.clear()
                    if said := list(self._said()):
                        await self._write(pb.RelayResponse(said=said))
                    self._controller.check_open()
                    if reading.done():
                        reading.result()  # raises what it refused
            finally:
                tasks = [reading, *self._beginning.values()]
                for task in tasks:
                    task.cancel()
                for call in self._calls.values():
                    self._controller.leave(call.answers, broken=bool(call.key))
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.RelayRequest]) -> None:
        latest = -1
        async for request in requests:
            if not request.HasField("generate"):
                self._leave(request.call)
                continue
            if request.call <= latest:
                raise InvalidRequest(f"call {request.call} is not the relay's first of that number; count upwards")
            latest = request.call
            self._beginning[request.call] = asyncio.create_task(self._begin(request.call, request.generate))

    async def _begin(self, number: int, request: pb.GenerateRequest) -> None:
        """Until it needs no task any more."""
        try:
            answers, model = await begin(request, self._controller)
            self._calls[number] = _Call(answers, list(answers), model, request.key)
            changed, waits = _Changed(self, number), answers[0].changed.is_set()
            for answer in answers:
                answer.changed = changed
            if waits:  # refused, or its caller came back
                changed.set()
            if request.progress:
                await tell_progress(answers[0], model, self._controller, functools.partial(self._tell, number))
        except Exception as e:
            del self._beginning[number]
            self._leave(number)
            self._say(_end(number, e))
        else:
            del self._beginning[number]

    async def _tell(self, number: int, said: pb.GenerateResponse) -> None:
        self._say(pb.Relayed(call=number, response=said))

    def _leave(self, number: int) -> None:
        """Nothing more is said of the call."""
        if (task := self._beginning.pop(number, None)) is not None:
            task.cancel()
        if (call := self._calls.pop(number, None)) is not None:
            self._controller.leave(call.answers)

    def ready(self, number: int) -> None:
        """The call has something to say."""
        self._ready[number] = None
        self._changed.set()

    def _say(self, said: pb.Relayed) -> None:
        self._out.append(said)
        self._changed.set()

    def _said(self) -> Iterator[pb.Relayed]:
        """What there is to say now."""
        out, self._out = self._out, []
        ready, self._ready = self._ready, {}
        yield from out
        for number in ready:
            call, failure = self._calls.get(number), None
            if call is None:
                continue
            try:
                for answer, piece, last in taken(call.answers, call.left, self._controller):
                    if last or piece.token_ids or piece.prompt_token_ids:
                        yield pb.Relayed(call=number, response=response(answer, piece, last, call.model.tokenizer,
                                                                        self._controller))
            except Exception as e:
                failure = e
            if failure is not None or not call.left:
                self._leave(number)
                yield _end(number, failure)


class _Changed(asyncio.Event):
    """Of one call's answers."""

    def __init__(self, relay: Relay, number: int):
        super().__init__()
        self._relay, self._number = relay, number

    def set(self) -> None:
        super().set()
        self._relay.ready(self._number)


def _end(number: int, failure: Exception | None) -> pb.Relayed:
    if failure is None:
        return pb.Relayed(call=number, end=pb.CallEnd(code="OK"))
    if isinstance(failure, BlitzError):
        return pb.Relayed(call=number, end=pb.CallEnd(code=failure.code, message=brief(str(failure))))
    _log.error("call %d of a relay failed", number, exc_info=failure)
    return pb.Relayed(call=number, end=pb.CallEnd(code="UNKNOWN", message=brief(f"the server failed: {failure}")))
