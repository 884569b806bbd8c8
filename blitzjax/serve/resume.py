"""How does a new controller become the one that died?

It replays the journal: the same orders, events and tokens in the same order give the same brain, answers and commands;
nothing is sent meanwhile. Then each worker says how many commands it has obeyed and gets the others, and sends what the
journal lacks (sessions.py). A worker that died meanwhile, or whose session does not fit, is lost and joins anew, as at
any other time. Invariant: a journal that is of another run, or cannot be read, is put aside and changes nothing.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import blitzjax
from blitzjax import events
from blitzjax.serve import journal as journals
from blitzjax.serve.journal import (
    Admitted, Deployed, Happened, Journal, Line, Removed, Said, Snapshot, StreamEnded,
)
from blitzjax.serve.model import load_model
from blitzjax.serve.replica import Replica

if typing.TYPE_CHECKING:
    from blitzjax.serve.controller import Controller

_log = logging.getLogger("blitzjax.controller")


@dataclass(frozen=True, slots=True)
class Past:
    """Where a journal leads."""

    at: float  # time of its last record
    stop: int  # its length, in bytes
    due: list[events.Event]  # its controller died before it could tell the brain


def with_journal(make: Callable[[], Controller], path: Path | None) -> Controller:
    """The controller that died and left the journal at `path`, else a new one; None: without a journal.

    Raises ConfigError if the other one still runs.
    """
    controller = make()
    if path is None:
        controller.begin(None, 0.0, False)
        return controller
    about = json.loads(json.dumps({"blitzjax_journal": 1, "version": blitzjax.__version__, **controller.about}))
    if path.exists():
        journals.check_free(path)
        try:
            header = _header(path, about)
            past = replay(controller.replica, path)
        except Exception as e:  # whatever it is: the requests are lost, the cluster is not
            _put_aside(path, e)
            controller = make()
        else:
            at = max(past.at, time.time() - header["epoch"])
            _log.info("resumed from %s", path)
            controller.begin(Journal(path, header, past.stop), at, True, past.due)
            return controller
    header = about | {"id": uuid.uuid4().hex, "epoch": time.time()}
    controller.begin(Journal(path, header), 0.0, False)
    return controller


def _header(path: Path, about: Mapping[str, object]) -> dict[str, typing.Any]:
    """Raises ValueError if the journal at `path` is not `about` this model, configuration and set of workers."""
    header = journals.read_header(path)
    other = [key for key, value in about.items() if header.get(key) != value]
    if other:
        raise ValueError(f"it was written with another {' and '.join(other)}")
    return header


def _put_aside(path: Path, error: Exception) -> None:
    aside = path.replace(path.with_name(path.name + ".unusable"))
    _log.warning("starting afresh, for the journal of an earlier controller cannot be resumed; it is now %s: %s", aside,
                 error if isinstance(error, ValueError) else repr(error))


def replay(replica: Replica, path: Path) -> Past:
    """Makes a new replica what the records in the journal say. Raises ValueError where they contradict it."""
    past = Past(0.0, journals.header_bytes(path), [])
    for line in journals.read(path):
        for instance, count in line.heard.items():
            replica.links[instance].received = count
        past = _replayed(replica, line, past.due)
    return past


def _replayed(replica: Replica, line: Line, due: list[events.Event]) -> Past:
    match line.record:
        case Admitted(at=at, order=order, first=first):
            due = [*due, *replica.admit(order, first, at)]
        case Happened(event=event):
            at, due = event.at, _without(event, due)
            due = [*replica.replay(event), *due]
        case Said(at=at, instance=instance, said=said):
            due = [*due, *replica.told(instance, said, at)]
        case StreamEnded(at=at, request_id=request_id, delivered=delivered):
            replica.orders.stream_ended(request_id, delivered, at)
            replica.orders.prune(at)
        case Deployed(at=at, directory=directory, name=name, least=least, most=most):
            due = [*due, *replica.deploy(load_model(Path(directory), name), least, most, at)]
        case Removed(at=at, model=model):
            replica.remove(model)
        case Snapshot(at=at, state=state):
            replica.restore(state)
        case _:
            typing.assert_never(line.record)
    return Past(at, line.stop, due)


def _without(event: events.Event, due: list[events.Event]) -> list[events.Event]:
    """What follows from a record comes right after it."""
    if not due:
        return due
    if type(event) is not type(due[0]) or replace(due[0], at=event.at) != event:
        raise ValueError(f"{due[0]} should have come before {event}")
    return due[1:]


def compact(journal: Journal, at: float, replica: Replica) -> None:
    """Replaces the journal's records by what they came to; they stay if a part of the brain cannot be pickled."""
    try:
        journal.compact(at, replica.snapshot())
    except (pickle.PicklingError, AttributeError, RecursionError, TypeError, OSError) as e:
        _log.error("the journal cannot be shortened and grows on: %r", e)
        journal.postpone()
