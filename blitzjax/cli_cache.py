"""`blitzjax cache`: what is kept of earlier starts, and what of it can go?

Invariant: what is removed is made again by whoever needs it, a conversion from its model, an executable by compiling.
The last use is the time that a file or directory has, which every start that uses it renews.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blitzjax.engine import locations
from blitzjax.errors import BlitzError

_DAY_S = 86400.0
_COMPILED = (".xla", ".so", ".json")  # the last: the arrays that a module turned out to have


@dataclass(frozen=True, slots=True)
class Kept:
    """A converted model's directory, or a compiled file."""

    path: Path
    bytes: int
    used: float  # seconds since the epoch

    @property
    def is_model(self) -> bool:
        return self.path.suffix not in _COMPILED

    def remove(self) -> None:
        """Raises OSError."""
        if self.is_model:
            going = self.path.rename(self.path.with_name(f".{self.path.name}-removing"))  # nobody finds half of it
            shutil.rmtree(going)
        else:
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".lock").unlink(missing_ok=True)


def kept() -> Iterator[Kept]:
    """Conversions by this version and by others, also parts of those that were killed, then what was compiled."""
    for directory in sorted(d for d in (locations.default_cache() / "models").glob("v*/*") if d.is_dir()):
        if directory.name.startswith(".") and _in_work(directory):
            continue
        size = sum(file.stat().st_size for file in directory.rglob("*"))
        yield Kept(directory, size, directory.stat().st_mtime)
    arrays = locations.arrays_in(locations.default_cache())
    for file in sorted([*locations.executables_in("").glob("*"), *arrays.glob("*")]):
        if file.suffix in _COMPILED:
            status = file.stat()
            yield Kept(file, status.st_size, status.st_mtime)


def _in_work(part: Path) -> bool:
    """Whether who makes it lives: convert.py holds a lock meanwhile."""
    try:
        with part.with_name(f"{part.name.rpartition('-')[0]}.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as e:
        return isinstance(e, BlockingIOError)
    return False


def cache(args: argparse.Namespace) -> int:
    found = list(kept())
    if args.prune is None:
        print("\n".join(_lines(found)))
        return 0
    if not args.prune >= 0:
        raise BlitzError(f"--prune wants days, at least 0, got {args.prune:g}")
    old = [item for item in found if item.used <= time.time() - args.prune * _DAY_S]
    try:
        for item in old:
            item.remove()
    except OSError as e:
        raise BlitzError(f"cannot remove from the cache: {e}") from e
    print(f"removed {len([i for i in old if i.is_model])} models and {len([i for i in old if not i.is_model])} compiled "
          f"files, {_size(old)}; {_size(found, but=old)} are left")
    return 0


def _lines(found: list[Kept]) -> Iterator[str]:
    yield f"{'last used':10}  {'size':>10}  in {locations.default_cache()}"
    ours = locations.models_in(locations.default_cache())
    for item in found:
        if item.is_model:
            stale = "" if item.path.parent == ours else "  (of another version, which this one converts anew)"
            part = "  (a part, of a conversion that was killed)" if item.path.name.startswith(".") else ""
            yield f"{_day(item.used)}  {_size([item]):>10}  {item.path.name}{part or stale}"
    if compiled := [item for item in found if not item.is_model]:
        yield (f"{_day(max(i.used for i in compiled))}  {_size(compiled):>10}  {len(compiled)} compiled files, some not used "
               f"since {_day(min(i.used for i in compiled))}")
    yield f"{'':10}  {_size(found):>10}  in all"


def _size(items: Iterable[Kept], but: Iterable[Kept] = ()) -> str:
    return f"{(sum(i.bytes for i in items) - sum(i.bytes for i in but)) / 1e6:.1f} MB"


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))
