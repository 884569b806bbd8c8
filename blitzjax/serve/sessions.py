"""What passed between a worker and its controller, so that the next controller can go on with the same session.

Both sides count: the worker the commands that it took, the controller the events that it has written down. The worker
keeps the others, so that nothing is lost when a controller dies between receiving and writing. Invariant: events are
sent in order and, to one controller, once.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from blitzjax.errors import ConfigError
from blitzjax.v1 import worker_pb2 as pb

_LEAVE_S = 5.0  # until it is noticed that a controller was killed


class Outbox:
    """The events of one connection, in order; `close` ends the stream."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[pb.WorkerEvent | None] = queue.SimpleQueue()

    def put(self, event: pb.WorkerEvent) -> None:
        self._queue.put(event)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[pb.WorkerEvent]:
        return iter(self._queue.get, None)


class Session:
    """A worker's side of its controller's session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)  # a controller
        self._name = ""  # empty: it ends with its connection
        self._outbox: Outbox | None = None
        self._kept: deque[pb.WorkerEvent] = deque()  # the newest events, which the controller has not written down
        self._said = 0  # events
        self._taken = 0  # commands
        self._connections = 0
        self._controller = ("", 0.0)  # the last one: its journal, and when it began

    def claim(self, configure: pb.Configure) -> None:
        """Raises ConfigError if a successor of that controller was here already, or another one is and does not leave."""
        with self._lock:
            name = _journal(configure)
            if not self._left.wait_for(lambda: self._outbox is None or name == self._controller[0], _LEAVE_S):
                raise ConfigError(f"{configure.instance} belongs to another controller")
            if name and name == self._controller[0] and configure.since < self._controller[1]:
                raise ConfigError("a later controller has taken over")

    def connect(self, configure: pb.Configure, outbox: Outbox, renew: Callable[[], pb.WorkerEvent]) -> bool:
        """A controller is here. If it resumes this session, it gets what it does not know. Otherwise a new session
        begins with the event that `renew` gives, and what the earlier one had to say is dropped. → whether it is new.

        Raises what `claim` does.
        """
        with self._lock:
            self.claim(configure)
            oldest = self._said - len(self._kept)
            resumes = configure.resume and configure.session != "" and configure.session == self._name
            resumes = resumes and oldest <= configure.received <= self._said
            self._controller, self._outbox = (_journal(configure), configure.since), outbox
            self._connections += 1
            if resumes:
                outbox.put(pb.WorkerEvent(resumed=pb.Resumed(taken=self._taken)))
                self._drop(configure.received)
                for event in self._kept:
                    outbox.put(event)
            else:
                self._name, self._said, self._taken = configure.session, 0, 0
                self._kept.clear()
                self._put(renew())
            return not resumes

    def put(self, event: pb.WorkerEvent, void: Callable[[], bool] = lambda: False) -> None:
        """Says something, unless it is `void` by now; it waits if the connection broke, and is dropped if there is no
        session.
        """
        with self._lock:
            if not void():
                self._put(event)

    def take(self, outbox: Outbox, command: pb.WorkerCommand, obey: Callable[[], None]) -> None:
        """Obeys a command that came with `outbox`'s connection, unless a later one has replaced it: the command then
        comes again. One that says nothing only confirms events.
        """
        with self._lock:
            if self._outbox is not outbox:
                return
            if command.WhichOneof("command") is not None:
                obey()
                self._taken += 1
            self._drop(command.received)

    def disconnect(self, outbox: Outbox) -> int | None:
        """The connection broke. → its number if it was the session's last one and the session waits for the next."""
        with self._lock:
            if self._outbox is not outbox:
                return None
            self._outbox = None
            self._left.notify_all()
            return self._connections

    def end(self, connection: int, forget: Callable[[], None]) -> None:
        """Gives the session up, and what came with it, if nobody has connected since."""
        with self._lock:
            if self._outbox is None and self._connections == connection:
                self._name = ""
                self._kept.clear()
                forget()

    @property
    def resumable(self) -> bool:
        return bool(self._name)

    def _put(self, event: pb.WorkerEvent) -> None:
        event.taken = self._taken
        if self._name:
            self._said += 1
            self._kept.append(event)
        if self._outbox is not None:
            self._outbox.put(event)

    def _drop(self, received: int) -> None:
        """The controller has written down the first `received` events."""
        while self._kept and self._said - len(self._kept) < received:
            self._kept.popleft()


def _journal(configure: pb.Configure) -> str:
    return configure.session.partition("/")[0]
