"""What every peer of bench.peers can do, and what its processes cost.

Invariant: a peer's figures are those of all of its processes, and of no others.
"""

from __future__ import annotations

import abc
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Tokens = Sequence[int]
SLOTS, CONTEXT = 16, 1024  # streams, and tokens each may have


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are of time.monotonic; `first_s` is None where a peer answers all at once."""

    sent_s: float
    first_s: float | None
    last_s: float
    tokens: int


class Peer(abc.ABC):
    version: str

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self.checkpoint, self.directory = checkpoint, directory
        self._root: int | None = None  # the process whose descendants' memory counts; None: every worker's

    @abc.abstractmethod
    def install(self) -> None: ...

    @abc.abstractmethod
    def started(self) -> contextlib.AbstractAsyncContextManager[None]: ...

    @abc.abstractmethod
    async def answer(self, asked: Sequence[Tokens], max_tokens: int) -> list[Answer]:
        """All at once, greedy, each exactly `max_tokens` tokens."""

    def peak_rss_mb(self) -> float:
        """Sum over the processes below `_root` of the most that each ever held."""
        assert self._root is not None
        return sum(_peak_kb(pid) for pid in _descendants(self._root)) / 1024

    def cpu_s(self) -> float:
        """What those processes have computed so far, all cores together."""
        assert self._root is not None
        return sum(_cpu_s(pid) for pid in _descendants(self._root))


def call(command: Sequence[str | Path]) -> None:
    """Runs it to its end. Raises SystemExit with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def environment(home: Path, *packages: str) -> None:
    """A virtual environment at `home` with these packages, made once."""
    if (home / "made").exists():
        return
    print(f"installing {', '.join(packages)}", flush=True)
    call([sys.executable, "-m", "venv", "--clear", home])
    call([home / "bin" / "pip", "install", "--quiet", *packages])
    (home / "made").touch()


def _descendants(root: int) -> list[int]:
    """`root`, unless it is this process, and everything below it."""
    below = [pid for task in Path(f"/proc/{root}/task").iterdir()
             for pid in map(int, (task / "children").read_text().split())]
    return ([] if root == os.getpid() else [root]) + [p for pid in below for p in _descendants(pid)]


def _cpu_s(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5): utime, stime
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _peak_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
