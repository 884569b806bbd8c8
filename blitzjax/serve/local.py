"""A whole cluster on this machine: coordination service, worker pool and controller as supervised processes. Or, of a
cluster on several machines, what runs on the first.

Invariant: no process outlives its LocalCluster, even when the parent is killed. Workers, the coordination service and a
controller that was killed, as it is when it hangs, start again; a controller that ends by itself ends the cluster. Used
by `blitzjax serve`, tests and benchmarks, which are plain clients of the controller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from blitzjax import config as configs
from blitzjax.addresses import joined
from blitzjax.config import Config
from blitzjax.errors import BlitzError
from blitzjax.serve.access import TLS
from blitzjax.serve.client import Client
from blitzjax.serve.processes import TAIL_LINES, TELL_AFTER, Process, say, tail
from blitzjax.serve.pulse import Pulse
from blitzjax.serve.hosts import POLL_S, Launch, Workers, free_ports

_GATEWAY_GRACE_S = 2.0


class LocalCluster:
    """`with LocalCluster(config, directory) as cluster: cluster.client().generate(...)`.

    One thread, the supervisor, starts and restarts processes: a child's death signal follows the thread that made it.
    """

    def __init__(self, config: Config, model_dirs: Path | Sequence[Path], launch: Launch = Launch(),
                 names: Sequence[str] = ()):
        """`model_dirs`: one checkpoint or several, to begin with, served under `names` if there are any.
        `config.serve.port` 0 picks a free port.

        Nothing starts before `start`.
        """
        pool, host = config.cluster.pool, config.serve.host
        ports = free_ports(pool + 2)
        self.config = replace(config, serve=replace(config.serve, port=config.serve.port or ports[0]))
        address = joined(host, self.config.serve.port)
        tls = bool(config.serve.ssl_certfile)
        self.address = f"{TLS}{address}" if tls else address
        self.workers = Workers(config, launch, launch.ports or ports[1:])
        self.run_dir, self.worker_addresses = self.workers.run_dir, self.workers.addresses
        socket = self.run_dir / "controller.sock"  # the certificate may be of other names than we call it by
        self._inside = f"unix:{socket}" if tls else address
        self._stopping = threading.Event()
        self._terminating = False
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # guards every process against the supervisor; signal handlers take it again
        hang_s = config.serve.hang_timeout_s
        self._coordinator = Process("coordinator", (
            *launch.coordinator, "--address", self.workers.coordinator, "--size", str(pool), "--heartbeat-s",
            str(config.cluster.heartbeat_s)), dict(os.environ), self.run_dir / "coordinator.log",
            Pulse(self.workers.coordinator, hang_s))
        self._journal = self.run_dir / "journal"
        journal = ("--journal", str(self._journal)) if config.serve.resume_timeout_s else ()
        listen = ("--socket", str(socket)) if tls else ()
        self._controller = Process("controller", (
            sys.executable, "-m", "blitzjax.serve.controller", *_model_args(model_dirs, names), "--workers",
            ",".join(f"i{k}={address}" for k, address in enumerate(self.worker_addresses)), "--config-json",
            json.dumps(configs.to_tables(self.config)), *journal, *listen), dict(os.environ),
            None if launch.console else self.run_dir / "controller.log",
            Pulse(self._inside, hang_s) if config.serve.resume_timeout_s else None)  # else killing it would be the end
        self._gateway = [Process("gateway", (
            sys.executable, "-m", "blitzjax.serve.gateway", "--address", self._inside, "--host", host, "--port",
            str(config.serve.http_port), "--allowed-origins", json.dumps(config.serve.allowed_origins), "--ssl-certfile",
            config.serve.ssl_certfile, "--ssl-keyfile", config.serve.ssl_keyfile), dict(os.environ),
            self.run_dir / "gateway.log")] if config.serve.http_port else []

    # ---- life

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop()
        others = (self._controller, self._coordinator, *self._gateway)
        if kind is None and self._controller.code in (0, None) and not any(process.lives > 1 for process in others):
            self.workers.tidy()

    def start(self) -> None:
        """Starts every process and returns at once; see `wait_ready`."""
        self._journal.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._supervise, name="blitzjax supervisor", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self, grace_s: float = 20.0) -> int | None:
        """Ends everything: the controller gets SIGTERM and `grace_s` seconds to drain. Returns its exit code."""
        if self._thread is None:
            return self._controller.code
        with contextlib.suppress(TimeoutError):
            self.terminate()
            self.wait(grace_s)
        self._stopping.set()
        self._thread.join()
        self._thread = None
        atexit.unregister(self.stop)
        return self._controller.code

    def terminate(self) -> None:
        """Asks the controller to drain and leave; a second call makes it leave at once."""
        self._terminating = True
        self._signal(self._controller, signal.SIGTERM)

    def wait(self, timeout_s: float | None = None) -> int:
        """The controller's exit code. Raises TimeoutError."""
        if not self._controller.ended.wait(timeout_s):
            raise TimeoutError(f"the controller still runs after {timeout_s:g} s")
        return self._controller.code or 0

    def client(self) -> Client:
        return Client(self._inside)

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Returns when an instance serves, or a model at zero can have one at once.

        Raises TimeoutError, or BlitzError if the controller ended.
        """
        deadline = time.monotonic() + timeout_s
        with self.client() as client:
            while not client.ready():
                if self._controller.ended.is_set():
                    code, said = self._controller.code, self.tail("controller")
                    raise BlitzError(f"the controller ended with code {code}:\n{said}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no instance serves after {timeout_s:g} s; logs are in {self.run_dir}")
                time.sleep(POLL_S)

    # ---- what tests and benchmarks do to processes

    def worker_pid(self, k: int) -> int | None:
        """None while it is down."""
        with self._lock:
            return self.workers.processes[k].pid

    def controller_pid(self) -> int | None:
        """None while it is down."""
        with self._lock:
            return self._controller.pid

    def signal_worker(self, k: int, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self.workers.processes[k], number)

    def signal_controller(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self._controller, number)

    def signal_coordinator(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self._coordinator, number)

    def tail(self, name: str, lines: int = TAIL_LINES) -> str:
        """End of a log: "controller", "coordinator" or "worker-K"."""
        return tail(self.run_dir / f"{name}.log", lines)

    def _signal(self, process: Process, number: signal.Signals) -> None:
        with self._lock:
            process.signal(number)

    # ---- the supervisor thread

    def _supervise(self) -> None:
        workers = self.workers.processes.values()
        supervised = (self._coordinator, *workers, *self._gateway)
        with self._lock:
            if not self._terminating:
                self._controller.start_when_due()
        while not self._stopping.wait(POLL_S):
            with self._lock:
                if not self._terminating:
                    for process in (self._controller, self._coordinator):
                        process.kill_if_hung()
                if self._controller.poll():
                    self._controller_died()
                dead = [process for process in supervised if process.poll()]
                if self._coordinator in dead:  # workers joined the dead service: they must join the next one
                    for worker in workers:
                        worker.signal(signal.SIGKILL)
                for process in supervised:
                    process.start_when_due()
                if self._terminating and self._controller.pid is None:
                    self._controller.ended.set()
                if not self._controller.ended.is_set():
                    self._controller.start_when_due()
            for process in dead:
                process.tell()
        for gateway in self._gateway:  # what the controller said last is on its way to readers
            gateway.end(_GATEWAY_GRACE_S)
        for process in (self._controller, *supervised):
            process.kill()
        self._controller.ended.set()

    def _controller_died(self) -> None:
        """Killed, it starts again and resumes. What killed it again and again may be in the journal: that goes."""
        code = self._controller.code or 0
        if self._terminating and code == -signal.SIGTERM:
            code = self._controller.code = 0  # told to go before it could listen
        if code >= 0 or self._terminating or not self.config.serve.resume_timeout_s:
            self._controller.ended.set()
            return
        say(f"the controller was killed by signal {-code}; it starts again and resumes")
        if self._controller.short_lives > TELL_AFTER:
            self._journal.unlink(missing_ok=True)


def _model_args(model_dirs: Path | Sequence[Path], names: Sequence[str]) -> Iterator[str]:
    for directory in [model_dirs] if isinstance(model_dirs, Path) else model_dirs:
        yield from ("--model-dir", str(directory))
    for name in names:
        yield f"--served-model-name={name}"
