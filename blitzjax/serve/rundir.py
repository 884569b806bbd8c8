"""Where do the processes of a cluster write? Logs, and a journal that has prompts in it: nobody else may read them.

Invariant: a temporary directory is locked while its supervisor lives, so the journals of those that were killed can go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PRIVATE = 0o700  # the mode of such a directory
_PREFIX = "blitzjax-"


def private_file(path: str, flags: int) -> int:
    """An opener for `open`."""
    return os.open(path, flags, 0o600)


class RunDir:
    """One supervisor's."""

    def __init__(self, path: Path | None):
        """None: a temporary one. What a killed supervisor left of prompts is removed; its logs stay."""
        self._temporary = path is None
        if path is None:
            forget_killed()
        self.path = path or Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.path.mkdir(PRIVATE, parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        weakref.finalize(self, os.close, lock)

    def remove(self) -> None:
        """If it is temporary."""
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)


def forget_killed() -> None:
    """Removes the journals in temporary directories of ours whose supervisor is dead."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or it goes just now
            _forget(path)


def _forget(path: Path) -> None:
    """Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(directory).st_uid != os.geteuid():
            return
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(directory):
            if name.startswith("journal"):
                with open(name, opener=lambda name, flags: os.open(name, flags, dir_fd=directory)) as journal:
                    fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a controller has it open as long as it lives
                    os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
