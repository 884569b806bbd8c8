"""Compiled stages on disk: a worker that starts again loads them in milliseconds instead of compiling.

Invariant: a file's name is a digest of everything that shapes its content (source, shapes, shardings, jax, platform,
CPU features, XLA flags); a file that does not load is compiled again and replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental import serialize_executable

log = logging.getLogger(__name__)


class ExecutableCache:
    """Compiles ahead of time, one file per stage and shape. Several processes may share the directory."""

    def __init__(self, directory: Path, fingerprint: str, devices: Sequence[jax.Device]):
        """`directory` exists. Stages run on `devices`; `fingerprint` stands for what they compute: spec and source of
        the traced code.
        """
        self.directory = directory
        shaping = "\n".join([fingerprint, _machine(), str([d.id for d in devices])])
        self.fingerprint = hashlib.sha256(shaping.encode()).hexdigest()  # once: it has all sources in it
        self._devices = list(devices)
        self.compiled = 0
        self.loaded = 0

    def get(self, name: str, fn: Callable, args: tuple, donate: tuple[int, ...] = (), out_shardings=None):
        """`fn` compiled for abstract `args` (pytrees of ShapeDtypeStruct with shardings)."""
        path = self.directory / f"{name}-{self._digest(name, args, donate, out_shardings)}.xla"
        found = self._load(path)
        if found is not None:
            return found
        with open(path.with_suffix(".lock"), "w") as lock:  # the same stage is compiled by one process
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._load(path)
            return found if found is not None else self._compile(path, fn, args, donate, out_shardings)

    def _load(self, path: Path):
        try:
            payload = pickle.loads(path.read_bytes())
            found = serialize_executable.deserialize_and_load(*payload, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as e:  # any damage or incompatibility means: compile
            log.warning("executable %s does not load (%s); compiling it again", path.name, e)
            return None
        self.loaded += 1
        return found

    def _compile(self, path: Path, fn: Callable, args: tuple, donate: tuple[int, ...], out_shardings):
        jitted = jax.jit(fn, donate_argnums=donate, out_shardings=out_shardings)
        compiled = jitted.lower(*args).compile()
        self.compiled += 1
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        draft.replace(path)
        return compiled

    def _digest(self, name: str, args: tuple, donate: tuple[int, ...], out_shardings) -> str:
        leaves, tree = jax.tree.flatten(args)
        text = [self.fingerprint, name, str(tree), str(donate), str(out_shardings)]
        text += [f"{x.shape}{x.dtype}{x.sharding}" for x in leaves]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:24]


def _machine() -> str:
    device = jax.local_devices()[0]
    return "\n".join([jax.__version__, device.platform, device.device_kind, str(jax.local_device_count()),
                      cpu_features(), os.environ.get("XLA_FLAGS", "")])


def cpu_features() -> str:
    """XLA:CPU compiles for the features of the machine it runs on."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""
