"""What do workers give each other when asked? What they have compiled, before the asking one compiles it; and the
tokenizer of a model whose checkpoint is not on its host. They are asked one after the other.

Each asks its successor in the order of ranks first, so that nobody is asked by all, and the controller by nobody. What
comes is code that will run: it is taken from the peers that the controller named, over the channels that carry its and
their commands, and from nobody else. Invariant: silent peers cost a small part of the time, and never fail a worker.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from blitzjax import config as configs
from blitzjax.engine.locations import executables_in
from blitzjax.serve.channels import TO_WORKER
from blitzjax.types import InstanceId
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

log = logging.getLogger("blitzjax.worker")
_TIMEOUT_S = 5.0  # of one question: an executable has at most some tens of MB
_REST = 10  # a peer that cost t seconds in vain is left alone for so many times t
_LEAST_REST_S = 1.0
_LENDING = 8  # files read at a time; the gRPC server must have threads for them and for what it is there for


class Lender:
    """The other end: gives files of this worker's cache to workers that ask. Thread-safe."""

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._reading = threading.BoundedSemaphore(_LENDING)

    def open(self, configure: pb.Configure) -> None:
        """From now on there may be something to lend, if the configuration wants it. Raises ConfigError."""
        engine = configs.from_tables(json.loads(configure.config_json)).engine
        self._directory = executables_in(engine.executable_cache) if engine.share_executables else None

    def lend(self, name: str) -> bytes | None:
        """None while it must not, has none, or is asked by many."""
        if self._directory is None or not self._reading.acquire(blocking=False):
            return None
        try:
            from blitzjax.engine.executables import read_file  # imports jax

            return read_file(self._directory, name)
        finally:
            self._reading.release()


class Peer:
    """One other worker, by its address."""

    def __init__(self, address: str):
        self._address = address
        self._channel: grpc.Channel | None = None
        self._rests_until = 0.0

    def ask(self, question: pb.WorkerCommand) -> bytes | None:
        """None too if it does not answer, and then for a while without asking."""
        began = time.monotonic()
        if began < self._rests_until:
            return None
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._address, options=TO_WORKER)
        try:
            answer = next(rpc.WorkerStub(self._channel).Run(iter((question,)), timeout=_TIMEOUT_S), None)
        except grpc.RpcError as e:
            log.info("nothing from %s: %s", self._address, e.details())
            self.close()
            now = time.monotonic()
            self._rests_until = now + max(_LEAST_REST_S, _REST * (now - began))
            return None
        return answer.fetched.content if answer is not None and answer.fetched.HasField("content") else None

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class Peers:
    """All others of the cluster. Thread-safe."""

    def __init__(self, me: InstanceId, peers: Sequence[pb.Peer]):
        """`peers` are all workers."""
        ranked = sorted(peers, key=lambda peer: peer.rank)
        mine = next((k for k, peer in enumerate(ranked) if peer.instance == me), 0)
        self.begin = mine / max(1, len(ranked))  # the part of the work that this one begins with
        self._peers = [Peer(peer.address) for peer in ranked[mine + 1:] + ranked[:mine]]
        self._lock = threading.Lock()

    def fetch(self, name: str) -> bytes | None:
        """See engine.executables.Fetch."""
        return self._first(pb.WorkerCommand(fetch_executable=pb.FetchExecutable(name=name)))

    def tokenizer(self, model: str) -> bytes | None:
        """The model's tokenizer.json; None if nobody has it."""
        return self._first(pb.WorkerCommand(fetch_tokenizer=pb.FetchTokenizer(model=model)))

    def _first(self, question: pb.WorkerCommand) -> bytes | None:
        with self._lock:
            return next((content for peer in self._peers if (content := peer.ask(question)) is not None), None)

    def close(self) -> None:
        """Ends the connections; the next question opens them again."""
        with self._lock:
            for peer in self._peers:
                peer.close()
