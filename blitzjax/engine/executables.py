"""Compiled stages on disk: a worker that starts again loads them in milliseconds instead of compiling, and one that has
none asks others for theirs.

Invariant: a file's name is a digest of everything that shapes its content (source, sizes, devices, jax, platform, CPU
model and features, NVIDIA's libraries, XLA flags), so that no program of ours is traced to find it, and it ends with a
checksum of the rest; a file that is damaged or does not load is compiled again and replaced. What loads, runs: files
must come from where commands come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

from blitzjax.engine.locations import mark_used

log = logging.getLogger(__name__)
Fetch = Callable[[str], bytes | None]  # a file of that name from elsewhere, or None; may take a while, never raises

_NAME = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{16,24}\.(xla|so)")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_CPU = ("vendor_id", "cpu family", "model\t", "flags", "CPU implementer", "CPU part", "Features")  # in /proc/cpuinfo


class Program(NamedTuple):
    """What is compiled: `fn` for abstract `args`, pytrees of ShapeDtypeStruct with shardings."""

    fn: Callable
    args: tuple
    donate: tuple[int, ...] = ()
    out_shardings: object = None

    def lowered(self) -> Lowered:
        return jax.jit(self.fn, donate_argnums=self.donate, out_shardings=self.out_shardings).lower(*self.args)


class ExecutableCache:
    """Compiles ahead of time, one file per stage and shape. Several processes may share the directory."""

    def __init__(self, directory: Path, fingerprint: str, devices: Sequence[jax.Device],
                 fetch: Fetch = lambda name: None):
        """`directory` exists. Stages run on `devices`; with what `fingerprint` stands for, spec and source of the traced
        code, a name says all about a program. `fetch` is asked before anything is compiled.
        """
        self.directory = directory
        shaping = "\n".join([fingerprint, _machine(), str([d.id for d in devices])])
        self.fingerprint = hashlib.sha256(shaping.encode()).hexdigest()  # once: it has all sources in it
        self._devices = list(devices)
        self._fetch = fetch
        self.compiled = 0
        self.loaded = 0  # from the directory
        self.fetched = 0

    def load(self, names: Sequence[str]) -> dict[str, Compiled]:
        """Those that were compiled before; as many at a time as this thread may use cores."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="load") as pool:
            each = pool.map(self._load, map(self._path, names))
            found = {name: one for name, one in zip(names, each, strict=True) if one is not None}
        self.loaded += len(found)
        return found

    def get(self, name: str, build: Callable[[], Program]) -> Compiled:
        """What `build` describes; it is called only if that must be compiled."""
        path = self._path(name)
        found = self._load(path)
        if found is not None:
            self.loaded += 1
            return found
        with alone(path):
            found = self._load(path)
            if found is not None:
                self.loaded += 1
                return found
            found = self._received(path)
            return found if found is not None else self._compile(path, build())

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self.fingerprint}\n{name}".encode()).hexdigest()[:24]
        return self.directory / f"{name}-{digest}.xla"

    def _load(self, path: Path) -> Compiled | None:
        try:
            program, takes, gives = pickle.loads(checked(path.read_bytes()))
            loaded = serialize_executable.deserialize_and_load(program, takes, gives, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as e:  # any damage or incompatibility means: compile
            log.warning("executable %s does not load (%s); compiling it again", path.name, e)
            return None
        mark_used(path)
        return loaded

    def _received(self, path: Path) -> Compiled | None:
        """It, from another worker."""
        found = self._load(path) if receive(path, self._fetch) else None
        if found is not None:
            self.fetched += 1
        return found

    def _compile(self, path: Path, program: Program) -> Compiled:
        compiled = program.lowered().compile()
        self.compiled += 1
        try:
            keep(path, pickle.dumps(serialize_executable.serialize(compiled)))
        except Exception as e:  # no room, or a platform that cannot
            log.warning("%s cannot be kept, so the next start compiles it again: %s", path, e)
        return compiled


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes this file; in a directory that only others write, where nothing is kept, each does."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            fcntl.flock(held.enter_context(open(path.with_suffix(".lock"), "w")), fcntl.LOCK_EX)
        yield


def read_file(directory: Path, name: str) -> bytes | None:
    """For another worker's `fetch`; None if it is not there, or has no name of a file that is kept so."""
    try:
        return (directory / name).read_bytes() if _NAME.fullmatch(name) else None
    except OSError:
        return None


def receive(path: Path, fetch: Fetch) -> bool:
    """The file of that name from elsewhere; False if nobody has it, undamaged."""
    content = fetch(path.name)
    if content is None:
        return False
    try:
        keep(path, checked(content))
    except (ValueError, OSError) as e:
        log.warning("%s came damaged, or cannot be kept: %s", path.name, e)
        return False
    return True


def keep(path: Path, payload: bytes) -> None:
    """Replaces the file at once. Raises OSError, and leaves nothing then."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        draft.write_bytes(payload + hashlib.sha256(payload).digest())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def checked(content: bytes) -> bytes:
    """The payload of a file. Raises ValueError if it is not what was kept."""
    payload = content[:-_CHECKSUM_BYTES]
    if hashlib.sha256(payload).digest() != content[len(payload):]:
        raise ValueError("its checksum differs")
    return payload


def _machine() -> str:
    """XLA:CPU compiles for the CPU that it runs on. For how many threads it cuts loops changes nothing that they give."""
    device = jax.local_devices()[0]
    return "\n".join(map(str, [
        jax.__version__, metadata.version("jaxlib"), sys.version_info[:2], device.platform,
        device.client.platform_version, device.device_kind, jax.local_device_count(), *_cpu(_CPU),
        *(_libraries() if device.platform == "gpu" else ()), os.environ.get("XLA_FLAGS", ""), "checksum last"]))


def _libraries() -> list[str]:
    """An executable may hold what one of them made, a plan of cuDNN's for one, that another version does not take."""
    return sorted(f"{found.name} {found.version}" for found in metadata.distributions() if found.name.startswith("nvidia-"))


def cpu_features() -> str:
    return "".join(_cpu(("flags", "Features")))


def _cpu(names: tuple[str, ...]) -> list[str]:
    """Those lines of /proc/cpuinfo about its first CPU."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return []
    return [line for line in first.splitlines() if line.startswith(names)]
