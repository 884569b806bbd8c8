"""A supervised process: it starts, dies, or hangs and is killed, and starts again after a pause that grows with short
lives.

Invariant: no process outlives the thread that started it, even when its parent is killed. Besides, the environment that a
worker needs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from blitzjax.config import Config
from blitzjax.serve.pulse import Pulse
from blitzjax.serve.rundir import PRIVATE, private_file

TELL_AFTER = 3  # short lives in a row before the end of its log is shown
_BACKOFF_S = (0.2, 5.0)  # first and longest pause before a process starts again
_HEALTHY_S = 10.0  # a process that lived this long starts again without a growing pause
TAIL_LINES = 25

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


class Process:
    """One program and its lives. Owned by the supervisor; others hold its lock."""

    def __init__(self, name: str, argv: tuple[str, ...], env: dict[str, str], log: Path | None,
                 pulse: Pulse | None = None):
        """`pulse`: what tells whether it hangs; None: nobody asks."""
        self.name, self.log = name, log
        self.code: int | None = None  # of the last life
        self.lives = 0  # so far
        self.short_lives = 0  # in a row
        self.ended = threading.Event()  # it will not start again; of the controller only
        self._argv, self._env, self._pulse = argv, env, pulse
        self._popen: subprocess.Popen[bytes] | None = None
        self._born = self._due = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._popen is None else self._popen.pid

    def _start(self) -> None:
        argv = (sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *self._argv)
        if self.log is not None:
            self.log.parent.mkdir(PRIVATE, parents=True, exist_ok=True)  # temporary files are cleaned away after days
        out = sys.stderr.buffer if self.log is None else open(self.log, "ab", opener=private_file)
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
                say(f"cannot start {self.name}: {e}")
                self._due = time.monotonic() + _BACKOFF_S[1]

    def poll(self) -> bool:
        """True once per death; then it starts again after a pause that grows with short lives."""
        if self._popen is None or self._popen.poll() is None:
            return False
        self.code, self._popen = self._popen.returncode, None
        if self._pulse is not None:
            self._pulse.forget()
        self.short_lives = self.short_lives + 1 if time.monotonic() - self._born < _HEALTHY_S else 0
        self._due = time.monotonic() + min(_BACKOFF_S[1], _BACKOFF_S[0] * 2 ** max(0, self.short_lives - 1))
        return True

    def kill_if_hung(self) -> None:
        """`poll` finds it dead then. A life without an answer is a short one, however long it lasted."""
        if self._popen is None or self._pulse is None or not (silent_s := self._pulse.hangs()):
            return
        say(f"the {self.name} has not answered for {silent_s:g} s; it is killed")
        if not self._pulse.answered:
            self._born = float("inf")
        self._pulse.forget()
        self.signal(signal.SIGKILL)

    def tell(self) -> None:
        """After a few short lives in a row, once: the end of its log goes to our stderr."""
        if self.short_lives == TELL_AFTER and self.log is not None:  # else it was there all the time
            say(f"{self.name} ends again and again (code {self.code}); the end of {self.log}:\n{tail(self.log)}")

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group; nothing happens while it is down."""
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def end(self, grace_s: float) -> None:
        """SIGTERM, and some time for it."""
        self.signal(signal.SIGTERM)
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._popen is not None:
            self._popen.wait()
            self.poll()


def say(text: str) -> None:
    """To whoever started us. A full disk, or a reader that left, must not end what is supervised."""
    with contextlib.suppress(OSError):
        print(f"blitzjax: {text}", file=sys.stderr)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def worker_env(config: Config, number: int, count: int, devices: Path = Path("/dev")) -> dict[str, str]:
    """Environment of worker `number` of `count` on this machine: ours, then what XLA and glibc need for it; what the user
    set is kept, but GPUs are divided among the workers, those of CUDA_VISIBLE_DEVICES if it is set.
    """
    env = dict(os.environ)
    tensor_parallel = config.engine.tensor_parallel
    gpus = _gpus(env, devices)
    if not gpus and not list(devices.glob("accel[0-9]*")):
        env.setdefault("JAX_PLATFORMS", "cpu")
    elif env.get("JAX_PLATFORMS") and "cpu" not in env["JAX_PLATFORMS"]:  # through which arrays travel
        env["JAX_PLATFORMS"] += ",cpu"
    env.setdefault("GLIBC_TUNABLES", _MALLOC)
    env["PYTHONUNBUFFERED"] = "1"
    if config.cluster.threads > 0:
        env["NPROC"] = str(config.cluster.threads)
    flags = [f"--xla_cpu_collective_timeout_seconds={max(1, round(config.transfer.collective_timeout_s))}"]
    if tensor_parallel > 1:  # of the CPU, should that be what computes
        flags.append(f"--xla_force_host_platform_device_count={tensor_parallel}")
    env["XLA_FLAGS"] = " ".join([env.get("XLA_FLAGS", ""), *flags]).strip()
    places = len(gpus) // tensor_parallel
    if places:
        place = number % places
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * tensor_parallel:(place + 1) * tensor_parallel])
        sharing = len(range(place, count, places))
        if sharing > 1 and not env.keys() & {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:
            env["XLA_CLIENT_MEM_FRACTION"] = f"{config.engine.memory_fraction / sharing:.3f}"
    return env


def _gpus(env: dict[str, str], devices: Path) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; it may name none."""
    present = sorted(devices.glob("nvidia[0-9]*"))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not present or visible is None:
        return [str(index) for index in range(len(present))]
    return [name for name in map(str.strip, visible.split(",")) if name not in ("", "-1")]
