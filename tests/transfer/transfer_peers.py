"""Real processes for the transfer tests: a coordinator and workers on loopback."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PEER = Path(__file__).with_name("peer.py")
ROOT = Path(__file__).parents[2]
ANSWER_TIMEOUT_S = 300.0
HEARTBEAT_S = 100.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Peer:
    """One worker process. `ask` sends an order and waits; `send` and `answer` do the halves."""

    def __init__(self, log: Path, *options: str) -> None:
        self._options = options
        self._log = log
        self.start()

    def start(self) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.events: list[dict] = []
        self._answers: queue.Queue[dict | None] = queue.Queue()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, str(PEER), *self._options], env=env, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=log, text=True)
        threading.Thread(target=self._read, args=(self.process, self._answers), daemon=True).start()

    def _read(self, process: subprocess.Popen, answers: queue.Queue) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(json.loads(line))
        answers.put(None)

    def send(self, op: str, **arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        """The next {"done": ...} or {"error": ...}."""
        while "unit" in (answer := self._next()):
            pass
        return answer

    def wait_unit(self) -> int:
        """The next unit that a multicast reports."""
        answer = self._next()
        assert "unit" in answer, answer
        return answer["unit"]

    def _next(self) -> dict:
        answer = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        assert answer is not None, f"peer {self._options} exited with {self.process.wait()}: {self.log_tail()}"
        return answer

    def ask(self, op: str, **arguments: object) -> object:
        self.send(op, **arguments)
        answer = self.answer()
        assert "done" in answer, answer
        return answer["done"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Cluster:
    """A coordinator and `size` peers that have joined. `generation()` never repeats."""

    def __init__(self, tmp: Path, size: int, lanes: int, timeout_s: float) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.lanes = lanes
        self._generations = itertools.count()
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with (tmp / "coordinator.log").open("wb") as log:
            self.coordinator = subprocess.Popen(
                [sys.executable, "-m", "blitzjax.transfer.coordinator", "--address", address, "--size", str(size),
                 "--heartbeat-s", str(HEARTBEAT_S)], env=env, stderr=log)
        self.peers = [Peer(tmp / f"peer{rank}.log", "--coordinator", address, "--rank", str(rank), "--size", str(size),
                           "--lanes", str(lanes), "--timeout-s", str(timeout_s)) for rank in range(size)]

    def join(self) -> None:
        for peer in self.peers:
            peer.send("join")
        for peer in self.peers:
            assert "done" in peer.answer()

    def generation(self) -> int:
        return next(self._generations)

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
        self.coordinator.terminate()
        assert self.coordinator.wait(ANSWER_TIMEOUT_S) == 0


@contextlib.contextmanager
def cluster_of(tmp: Path, size: int, lanes: int, timeout_s: float = 100.0) -> Iterator[Cluster]:
    """`timeout_s`: of a collective that does not get on."""
    cluster = Cluster(tmp, size, lanes, timeout_s)
    try:
        yield cluster
    finally:
        cluster.close()
