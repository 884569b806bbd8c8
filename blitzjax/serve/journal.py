"""What has a controller written down, so that the next one can go on where it stopped?

The event log, and what bypasses the brain: orders, tokens, streams that ended. A controller's state follows from it
(resume.py), so tickets, generations of cliques, transfers and live pairs are known exactly; asking the workers instead
would know neither what was queued nor which cliques have failed. Invariant: `flush` comes before a command leaves, so
no worker knows more than the file. A killed process loses nothing that was flushed; a machine that loses its power
loses its workers too, so nothing waits for the disk.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from blitzjax import events, types
from blitzjax.errors import ConfigError
from blitzjax.serve import eventlog
from blitzjax.serve.answers import Order
from blitzjax.serve.rundir import private_file
from blitzjax.v1 import worker_pb2 as pb

_BUFFER_BYTES = 1 << 20  # reaches the file on `flush`, never in the middle of what belongs together
_GROWTH = 4  # a journal is rewritten when it is so much longer than what it began with
_SHORT_BYTES = 4 << 20  # replayed in about a second


@dataclass(frozen=True, slots=True)
class Admitted:
    """An order; its answers are numbered from `first` on."""

    at: float
    order: Order
    first: int


@dataclass(frozen=True, slots=True)
class Happened:
    """The brain was told."""

    event: events.Event


@dataclass(frozen=True, slots=True)
class Said:
    """A worker sent tokens."""

    at: float
    instance: types.InstanceId
    said: pb.Tokens | pb.Decoded


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The client of the order whose first answer this is has everything (`delivered`) or left."""

    at: float
    request_id: types.RequestId
    delivered: bool


@dataclass(frozen=True, slots=True)
class Deployed:
    """An operator wanted the model in this directory served, under this name; see events.ModelDeployed."""

    at: float
    directory: str
    name: str
    least: int | None
    most: int | None


@dataclass(frozen=True, slots=True)
class Removed:
    """Nothing is left of an undeployed model."""

    at: float
    model: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the records before it came to; see resume.py."""

    at: float
    state: bytes


Record: TypeAlias = Admitted | Happened | Said | StreamEnded | Deployed | Removed | Snapshot


@dataclass(frozen=True, slots=True)
class Line:
    """A record, and how many messages of some workers had been received with it."""

    record: Record
    heard: Mapping[types.InstanceId, int]
    stop: int  # offset of the next line


class Journal:
    """Appends. Owned by the controller; the file is locked for as long as it is open."""

    def __init__(self, path: Path, header: Mapping[str, object], stop: int | None = None):
        """Begins a file, or goes on behind its first `stop` bytes. Raises ConfigError if a controller has it open."""
        self.path, self.name = path, str(header["id"])
        self._header = _line(header)
        self._file = _locked(path)
        self._file.truncate(stop or 0)
        self._size = stop or 0
        self._heard: dict[types.InstanceId, int] = {}
        self._limit = _SHORT_BYTES
        self._failed: OSError | None = None  # a write, and so the next flush
        if not stop:
            self._write(self._header)

    def heard(self, instance: types.InstanceId, count: int) -> None:
        """`instance` has sent `count` messages; what follows from the last one is written next."""
        self._heard[instance] = count

    def admitted(self, at: float, order: Order, first: int) -> None:
        self._record({"order": dataclasses.asdict(order), "at": at, "first": first})

    def happened(self, event: events.Event) -> None:
        self._record(eventlog.event_record(event))

    def said(self, at: float, instance: types.InstanceId, said: pb.Tokens | pb.Decoded) -> None:
        """The hot path: no JSON encoder."""
        heard, self._heard = self._heard, {}
        tail = ",".join(f'"{i}":{count}' for i, count in heard.items())
        kind, coded = said.DESCRIPTOR.name, base64.b64encode(said.SerializeToString()).decode()
        self._write(f'{{"{kind}":"{coded}","at":{at!r},"instance":"{instance}","heard":{{{tail}}}}}\n'.encode())

    def stream_ended(self, at: float, request_id: types.RequestId, delivered: bool) -> None:
        self._record({"ended": request_id, "at": at, "delivered": delivered})

    def deployed(self, at: float, directory: str, name: str, least: int | None, most: int | None) -> None:
        self._record({"deployed": directory, "name": name, "at": at, "least": least, "most": most})

    def removed(self, at: float, model: str) -> None:
        self._record({"removed": model, "at": at})

    def flush(self) -> None:
        """Raises OSError when what was written since the last one did not reach the file."""
        if self._failed is not None:
            raise self._failed
        self._file.flush()

    @property
    def overgrown(self) -> bool:
        return self._size > self._limit

    def compact(self, at: float, state: bytes) -> None:
        """Replaces the file by one that says the same with a snapshot; at every moment one of them is complete."""
        spare = self.path.with_name(self.path.name + ".new")
        spare.unlink(missing_ok=True)
        lines = self._header + _line({"snapshot": base64.b64encode(state).decode(), "at": at})
        file = _locked(spare)
        file.write(lines)
        file.flush()
        os.replace(spare, self.path)
        self._file.close()
        self._file, self._size = file, len(lines)
        self._limit = max(_SHORT_BYTES, _GROWTH * self._size)

    def postpone(self) -> None:
        """There is no snapshot to be had now; the file may grow further before the next try."""
        self._limit = 2 * self._size

    def discard(self) -> None:
        """Nothing is left to resume."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk
            self._file.close()

    def _record(self, record: dict[str, object]) -> None:
        if self._heard:
            record["heard"], self._heard = self._heard, {}
        self._write(_line(record))

    def _write(self, line: bytes) -> None:
        self._size += len(line)
        try:
            self._file.write(line)
        except OSError as e:  # more than the buffer holds
            self._failed = e


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _locked(path: Path) -> BinaryIO:
    """Prompts and answers are in the file, and who writes it can make the controller do anything."""
    file = open(path, "ab", _BUFFER_BYTES, opener=private_file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise ConfigError(f"{path} belongs to a controller that still runs") from e
    return file


def check_free(path: Path) -> None:
    """Raises ConfigError if a controller has the journal open."""
    _locked(path).close()


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return len(file.readline())


def read_header(path: Path) -> dict[str, object]:
    """Raises OSError or ValueError when there is none."""
    with path.open("rb") as file:
        header = json.loads(file.readline())
    if not isinstance(header, dict):
        raise ValueError("the first line is no header")
    return header


def read(path: Path) -> Iterator[Line]:
    """All whole lines behind the header; a last one that was being written when its controller died is left out.

    Raises ValueError or KeyError for a line that is none of ours.
    """
    with path.open("rb") as file:
        stop = len(file.readline())
        for line in file:
            if not line.endswith(b"\n"):
                return
            stop += len(line)
            record = json.loads(line)
            yield Line(_decoded(record), record.get("heard", {}), stop)


def _decoded(record: Mapping[str, Any]) -> Record:
    match record:
        case {"Tokens": coded}:
            return Said(record["at"], record["instance"], pb.Tokens.FromString(base64.b64decode(coded)))
        case {"Decoded": coded}:
            return Said(record["at"], record["instance"], pb.Decoded.FromString(base64.b64decode(coded)))
        case {"event": _}:
            item = eventlog.item_of(record)
            if isinstance(item, events.Event):
                return Happened(item)
        case {"order": order}:
            return Admitted(record["at"], eventlog.build(Order, order), record["first"])
        case {"ended": request_id}:
            return StreamEnded(record["at"], request_id, record["delivered"])
        case {"deployed": directory}:
            return Deployed(record["at"], directory, record["name"], record["least"], record["most"])
        case {"removed": model}:
            return Removed(record["at"], model)
        case {"snapshot": coded}:
            return Snapshot(record["at"], base64.b64decode(coded))
    raise ValueError(f"unknown record {sorted(record)}")
