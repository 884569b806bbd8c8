"""Does a process still answer? One health call after another, which nobody waits for; that it knows no such call is an
answer too.

A process that is stopped, or stuck, holds its connections open and looks alive to everybody else. Invariant: only calls
count that failed one after the other, each after its full time, since the process last answered, or since it started: a
pause of the asking side does not make it hang, nor does a start that is slow by the measure of a loaded machine.
"""

from __future__ import annotations

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_MISSED = 5  # calls in a row
_MISSED_STARTING = 60  # before the first answer: imports and a journal take 2 s, on a slow disk among others much more
_ANSWERS = (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED)  # the latter is the coordination service's
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000))


class Pulse:
    """Owned by whoever supervises the process."""

    def __init__(self, address: str, limit_s: float):
        """`limit_s`: a process that answers nothing for so long hangs, a starting one after 12 times that; 0: none ever
        does.
        """
        self._address, self._call_s = address, limit_s / _MISSED
        self._channel: grpc.Channel | None = None
        self._call: grpc.Future | None = None
        self._next, self._missed = 0.0, 0
        self.answered = False  # once, since it started

    def hangs(self) -> float:
        """For so many seconds; 0: it does not. Looks after the call under way, makes the next one when it is time, and
        returns at once.
        """
        if not self._call_s:
            return 0.0
        now = time.monotonic()
        if self._call is not None and self._call.done():
            alive = self._call.code() in _ANSWERS
            self.answered, self._missed = self.answered or alive, 0 if alive else self._missed + 1
            self._call = None
        if self._call is None and now >= self._next:
            if self._channel is None:
                self._channel = grpc.insecure_channel(self._address, options=_OPTIONS)
            check = health_pb2_grpc.HealthStub(self._channel).Check
            self._call = check.future(health_pb2.HealthCheckRequest(), timeout=self._call_s)
            self._next = now + self._call_s
        return self._missed * self._call_s if self._missed >= (_MISSED if self.answered else _MISSED_STARTING) else 0.0

    def forget(self) -> None:
        """The process ended; the next one has not answered yet."""
        if self._channel is not None:
            self._channel.close()
        self._channel = self._call = None
        self._next, self._missed, self.answered = 0.0, 0, False
