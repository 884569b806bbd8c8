"""A whole cluster on this machine: coordination service, worker pool and controller as supervised processes.

Invariant: no process outlives its LocalCluster, even when the parent is killed. Workers, the coordination service and a
controller that was killed start again; a controller that ends by itself ends the cluster. Used by `blitzjax serve`,
tests and benchmarks, which are plain clients of the controller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blitzjax import config as configs
from blitzjax.config import Config
from blitzjax.errors import BlitzError
from blitzjax.serve.client import Client
from blitzjax.serve.pulse import Pulse

_POLL_S = 0.05
_BACKOFF_S = (0.2, 5.0)  # first and longest pause before a process starts again
_HEALTHY_S = 10.0  # a process that lived this long starts again without a growing pause
_TELL_AFTER = 3  # short lives in a row before the end of its log is shown
_TAIL_LINES = 25
_PORTS = (20000, 32000)  # below Linux's ephemeral ports: nobody's outgoing connection takes one between two lives

# Huge pages, and freed memory stays with the process: fresh pages are the main cost of large temporaries and caches.
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=34359738368"

# Runs before each program: dies with the parent (PR_SET_PDEATHSIG = 1), becomes the program.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """Where and how processes start; the default is everything on loopback.

    `hosts[k]` and `prefixes[k]` move worker k to another address, inside another network namespace say; the
    coordination service must then listen on a `coordinator_host` that they reach.
    """

    run_dir: Path | None = None  # logs; None: a temporary directory, which goes with a cluster that nothing happened to
    hosts: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, ...], ...] = ()
    coordinator_host: str = "127.0.0.1"
    env: Mapping[str, str] = field(default_factory=dict)  # for workers, over everything else
    worker: tuple[str, ...] = (sys.executable, "-m", "blitzjax.cli", "worker")
    coordinator: tuple[str, ...] = (sys.executable, "-m", "blitzjax.transfer.coordinator")
    console: bool = False  # the controller writes to our stderr instead of its log


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
        self.address = f"{host}:{self.config.serve.port}"
        self.run_dir = launch.run_dir or Path(tempfile.mkdtemp(prefix="blitzjax-"))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._launch = launch
        self._stopping = threading.Event()
        self._terminating = False
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # guards every _Process against the supervisor; signal handlers take it again
        self.worker_addresses = tuple(f"{self._host(k)}:{ports[k + 2]}" for k in range(pool))
        coordinator = f"{launch.coordinator_host}:{ports[1]}"
        self._coordinator = self._process("coordinator", (
            *launch.coordinator, "--address", coordinator, "--size", str(pool), "--heartbeat-s",
            str(config.cluster.heartbeat_s)))
        self._workers = [self._worker(k, coordinator) for k in range(pool)]
        self._journal = self.run_dir / "journal"
        journal = ("--journal", str(self._journal)) if config.serve.resume_timeout_s else ()
        self._controller = self._process("controller", (
            sys.executable, "-m", "blitzjax.serve.controller", *_model_args(model_dirs, names), "--workers",
            ",".join(f"i{k}={address}" for k, address in enumerate(self.worker_addresses)), "--config-json",
            json.dumps(configs.to_tables(self.config)), *journal), to_stderr=launch.console)
        resumes = config.serve.resume_timeout_s > 0  # else killing it would be the end
        self._pulse = Pulse(self.address, config.serve.hang_timeout_s if resumes else 0.0)

    # ---- life

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop()
        unharmed = self._controller.code in (0, None) and not any(
            process.lives > 1 for process in (self._controller, self._coordinator, *self._workers))
        if self._launch.run_dir is None and unharmed and kind is None:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def start(self) -> None:
        """Starts every process and returns at once; see `wait_ready`."""
        self._journal.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._supervise, name="blitzjax supervisor", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self, grace_s: float = 5.0) -> int | None:
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
        return self._controller.code

    def client(self) -> Client:
        return Client(self.address)

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
                time.sleep(_POLL_S)

    # ---- what tests and benchmarks do to processes

    def worker_pid(self, k: int) -> int | None:
        """None while it is down."""
        with self._lock:
            return self._workers[k].pid

    def controller_pid(self) -> int | None:
        """None while it is down."""
        with self._lock:
            return self._controller.pid

    def signal_worker(self, k: int, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self._workers[k], number)

    def signal_controller(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self._controller, number)

    def signal_coordinator(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._signal(self._coordinator, number)

    def tail(self, name: str, lines: int = _TAIL_LINES) -> str:
        """End of a log: "controller", "coordinator" or "worker-K"."""
        try:
            return "\n".join((self.run_dir / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    # ---- making processes

    def _host(self, k: int) -> str:
        return self._launch.hosts[k] if self._launch.hosts else "127.0.0.1"

    def _worker(self, k: int, coordinator: str) -> _Process:
        launch, cluster = self._launch, self.config.cluster
        prefix = launch.prefixes[k] if launch.prefixes else ()
        host = ("--host-ip", self._host(k)) if launch.hosts else ()
        cores = sorted(os.sched_getaffinity(0))
        core = ("--core", str(cores[k % len(cores)])) if cluster.pin_cores else ()
        argv = (*prefix, *launch.worker, "--listen", self.worker_addresses[k], "--rank", str(k), "--world",
                str(cluster.pool), "--coordinator", coordinator, *host, *core)
        return self._process(f"worker-{k}", argv, env=worker_env(self.config, k) | dict(launch.env))

    def _process(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None,
                 to_stderr: bool = False) -> _Process:
        log = None if to_stderr else self.run_dir / f"{name}.log"
        return _Process(name, tuple(argv), dict(os.environ if env is None else env), log)

    def _signal(self, process: _Process, number: signal.Signals) -> None:
        with self._lock:
            process.signal(number)

    # ---- the supervisor thread

    def _supervise(self) -> None:
        supervised = (self._coordinator, *self._workers)
        with self._lock:
            if not self._terminating:
                self._controller.start_when_due()
        while not self._stopping.wait(_POLL_S):
            with self._lock:
                if self._controller.poll():
                    self._controller_died()
                elif self._pulse.hangs() and not self._terminating:
                    self._kill_hung()
                dead = [process for process in supervised if process.poll()]
                if self._coordinator in dead:  # workers joined the dead service: they must join the next one
                    for worker in self._workers:
                        worker.signal(signal.SIGKILL)
                for process in supervised:
                    process.start_when_due()
                if self._terminating and self._controller.pid is None:
                    self._controller.ended.set()
                if not self._controller.ended.is_set():
                    self._controller.start_when_due()
            for process in dead:
                self._tell(process)
        for process in (self._controller, *supervised):
            process.kill()
        self._pulse.forget()
        self._controller.ended.set()

    def _kill_hung(self) -> None:
        print(f"blitzjax: the controller has not answered for {self.config.serve.hang_timeout_s:g} s; it is killed",
              file=sys.stderr)
        self._pulse.forget()
        self._controller.signal(signal.SIGKILL)

    def _controller_died(self) -> None:
        """Killed, it starts again and resumes. What killed it again and again may be in the journal: that goes."""
        self._pulse.forget()
        if self._controller.code >= 0 or self._terminating or not self.config.serve.resume_timeout_s:
            self._controller.ended.set()
            return
        print(f"blitzjax: the controller was killed by signal {-self._controller.code}; it starts again and resumes",
              file=sys.stderr)
        if self._controller.short_lives > _TELL_AFTER:
            self._journal.unlink(missing_ok=True)

    def _tell(self, process: _Process) -> None:
        if process.short_lives == _TELL_AFTER:
            print(f"blitzjax: {process.name} ends again and again (code {process.code}); the end of {process.log}:\n"
                  f"{self.tail(process.name)}", file=sys.stderr)


class _Process:
    """One program and its lives. Owned by the supervisor; others hold the cluster's lock."""

    def __init__(self, name: str, argv: tuple[str, ...], env: dict[str, str], log: Path | None):
        self.name, self.log = name, log
        self.code: int | None = None  # of the last life
        self.lives = 0  # so far
        self.short_lives = 0  # in a row
        self.ended = threading.Event()  # it will not start again; of the controller only
        self._argv, self._env = argv, env
        self._popen: subprocess.Popen[bytes] | None = None
        self._born = self._due = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._popen is None else self._popen.pid

    def _start(self) -> None:
        argv = (sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *self._argv)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)  # temporary files are cleaned away after some days
        out = sys.stderr.buffer if self.log is None else self.log.open("ab")
        try:
            self._popen = subprocess.Popen(argv, env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                           start_new_session=True)
        finally:
            if self.log is not None:
                out.close()
        self._born, self.lives = time.monotonic(), self.lives + 1

    def start_when_due(self) -> None:
        """What cannot start now, without memory or files say, is tried again; it must not end all others."""
        if self._popen is None and time.monotonic() >= self._due:
            try:
                self._start()
            except OSError as e:
                print(f"blitzjax: cannot start {self.name}: {e}", file=sys.stderr)
                self._due = time.monotonic() + _BACKOFF_S[1]

    def poll(self) -> bool:
        """True once per death; then it starts again after a pause that grows with short lives."""
        if self._popen is None or self._popen.poll() is None:
            return False
        self.code, self._popen = self._popen.returncode, None
        self.short_lives = self.short_lives + 1 if time.monotonic() - self._born < _HEALTHY_S else 0
        self._due = time.monotonic() + min(_BACKOFF_S[1], _BACKOFF_S[0] * 2 ** max(0, self.short_lives - 1))
        return True

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group; nothing happens while it is down."""
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._popen is not None:
            self._popen.wait()
            self.poll()


def worker_env(config: Config, k: int) -> dict[str, str]:
    """Environment of worker `k`: ours, then what XLA and glibc need for it; what the user set is kept."""
    env = dict(os.environ)
    accelerators = sorted(Path("/dev").glob("nvidia[0-9]*"))
    tensor_parallel = config.engine.tensor_parallel
    if not accelerators and not list(Path("/dev").glob("accel[0-9]*")):
        env.setdefault("JAX_PLATFORMS", "cpu")
    env.setdefault("GLIBC_TUNABLES", _MALLOC)
    env["PYTHONUNBUFFERED"] = "1"
    if config.cluster.threads > 0:
        env["NPROC"] = str(config.cluster.threads)
    if env.get("JAX_PLATFORMS") == "cpu":
        flags = [f"--xla_cpu_collective_timeout_seconds={max(1, round(config.transfer.collective_timeout_s))}"]
        if tensor_parallel > 1:
            flags.append(f"--xla_force_host_platform_device_count={tensor_parallel}")
        env["XLA_FLAGS"] = " ".join([env.get("XLA_FLAGS", ""), *flags]).strip()
    elif len(accelerators) >= config.cluster.pool * tensor_parallel:
        mine = range(k * tensor_parallel, (k + 1) * tensor_parallel)
        env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, mine)))
    elif accelerators:  # workers share devices
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / config.cluster.pool:.3f}")
    return env


def _model_args(model_dirs: Path | Sequence[Path], names: Sequence[str]) -> Iterator[str]:
    for directory in [model_dirs] if isinstance(model_dirs, Path) else model_dirs:
        yield from ("--model-dir", str(directory))
    for name in names:
        yield f"--served-model-name={name}"


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        return [_bind(held) for _ in range(count)]


def _bind(held: contextlib.ExitStack) -> int:
    while True:
        port = random.randrange(*_PORTS)
        sock = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            sock.bind(("0.0.0.0", port))
            return port
