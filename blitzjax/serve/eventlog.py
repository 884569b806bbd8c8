"""What happened and what was decided, as JSON lines: a run can be read, measured and replayed.

The first line describes the run (`specs`, `config`); every other one is an event or a command, in the order in which
the brain saw or gave them: feeding the events to a fresh Cluster gives the commands again. A log that cannot be written,
on a full disk say, ends; what it is about goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import mmap
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blitzjax import commands, events, types
from blitzjax.errors import reason

_log = logging.getLogger("blitzjax.controller")
if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = typing.TypeVar("T", bound="DataclassInstance")
_KINDS = {kind.__name__: kind for kind in (*typing.get_args(events.Event), *typing.get_args(commands.Command))}


class EventLog:
    """Appends records to a file. Owned by the controller; lines reach the disk on `flush`."""

    def __init__(self, path: Path, header: Mapping[str, object], resume: bool = False):
        """`resume`: the run that the file describes goes on behind its last whole line. Else a file that is there keeps
        what it has, under the next free number.
        """
        path = path.resolve()
        if not resume and path.is_file() and path.stat().st_size:
            free = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
            _log.warning("the event log of an earlier run is now %s", path.rename(next(p for p in free if not p.exists())))
        self._file = path.open("a", encoding="utf-8")
        whole = _whole_lines(path) if resume else 0
        self._file.truncate(whole)
        if not whole:
            self._write({"blitzjax_log": 1, **header})

    def event(self, event: events.Event) -> None:
        self._write(event_record(event))

    def command(self, at: float, command: commands.Command) -> None:
        """`at` is the time of the event that caused the command."""
        self._write({"command": type(command).__name__, "at": at, **dataclasses.asdict(command)})

    def flush(self) -> None:
        self._attempt(lambda: self._file.flush())

    def close(self) -> None:
        self._attempt(lambda: self._file.close())

    def _write(self, record: Mapping[str, object]) -> None:
        self._attempt(lambda: self._file.write(json.dumps(record, separators=(",", ":")) + "\n"))

    def _attempt(self, step: Callable[[], object]) -> None:
        if self._file.closed:
            return
        try:
            step()
        except OSError as e:
            _log.error("the event log cannot be written and ends here: %s", e)
            with contextlib.suppress(OSError):
                self._file.close()


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last one, of a file that may be larger than memory."""
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    at: float
    item: events.Event | commands.Command


def read_header(path: Path) -> dict[str, typing.Any]:
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())


def read(path: Path) -> Iterator[Record]:
    """Every event and command of a log, without a last line that was not finished.

    Raises ValueError that says which line is no record of a known kind.
    """
    with path.open(encoding="utf-8") as file:
        next(file)
        for number, line in enumerate(file, start=2):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                found = Record(record["at"], item_of(record))
            except (KeyError, TypeError, ValueError) as e:
                said = e.msg if isinstance(e, json.JSONDecodeError) else reason(e)  # without its own "line 1"
                raise ValueError(f"line {number} is no record: {said}") from e
            yield found


def event_record(event: events.Event) -> dict[str, object]:
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def item_of(record: Mapping[str, typing.Any]) -> events.Event | commands.Command:
    """Undoes `event_record`. Raises ValueError for an unknown kind."""
    name = record.get("event") or record.get("command")
    if name not in _KINDS:
        raise ValueError(f"unknown record {name!r}")
    return build(_KINDS[name], record)


_hints = functools.cache(typing.get_type_hints)


def build(kind: type[T], record: Mapping[str, typing.Any]) -> T:
    """The dataclass `kind` from what `dataclasses.asdict` and JSON made of it; other keys are ignored, and
    fields that it did not have then are left to their defaults.
    """
    hints = _hints(kind)
    return kind(**{f.name: _value(hints[f.name], record[f.name]) for f in dataclasses.fields(kind) if f.name in record})


def _value(hint: object, value: typing.Any) -> object:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)
    return types.frozen(value)
