"""Turns Events, Commands and Work into protobuf messages and back. Invariant: decode(encode(x)) == x.

Field names of the dataclasses in blitzjax/events.py and commands.py equal those of protos/blitzjax/v1/worker.proto,
so one walk over dataclass fields serves every message.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable

from google.protobuf.message import Message

from blitzjax import commands, events, types
from blitzjax.v1 import worker_pb2 as pb

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = typing.TypeVar("T")
_CHANNEL_FIELDS = ("instance",)  # a command's addressee is the stream it travels on


def encode_command(command: commands.Command, work: types.Work | None = None) -> pb.WorkerCommand:
    """`work` is required for Assign, which travels with its prompt."""
    out = pb.WorkerCommand()
    if isinstance(command, commands.Assign):
        assert work is not None and work.attempt == command.attempt
        fill(out.assign.work, work)
    else:
        message = getattr(out, _snake(type(command).__name__))
        message.SetInParent()
        fill(message, command, skip=_CHANNEL_FIELDS)
    return out


def decode_command(message: pb.WorkerCommand, instance: str) -> commands.Command | types.Work:
    """Assign comes back as the Work it carries."""
    which = message.WhichOneof("command")
    if which == "assign":
        return decode_work(message.assign.work)
    return _build(getattr(commands, _camel(which)), getattr(message, which), {"instance": instance})


def encode_event(event: events.Event) -> pb.WorkerEvent:
    out = pb.WorkerEvent()
    message = getattr(out, _snake(type(event).__name__))
    message.SetInParent()
    fill(message, event)
    return out


def decode_event(message: pb.WorkerEvent) -> events.Event:
    which = message.WhichOneof("event")
    return _build(getattr(events, _camel(which)), getattr(message, which), {})


def encode_work(work: types.Work) -> pb.Work:
    out = pb.Work()
    fill(out, work)
    return out


def decode_work(message: pb.Work) -> types.Work:
    return decode(types.Work, message)


def decode_logprobs(messages: Iterable[pb.TokenLogprob]) -> list[types.TokenLogprob]:
    return [types.TokenLogprob(m.logprob, m.rank, tuple(m.top_ids), tuple(m.top_logprobs)) for m in messages]


def model_spec(manifest_json: str) -> types.ModelSpec:
    """The ModelSpec in a checkpoint's manifest. Raises KeyError, TypeError or ValueError when it is not one."""
    values = json.loads(manifest_json)["spec"]
    known = {f.name for f in dataclasses.fields(types.ModelSpec)}
    return types.spec_from({k: v for k, v in values.items() if k in known})


def fill(message: Message, value: DataclassInstance, skip: tuple[str, ...] = ()) -> None:
    """Copies every dataclass field of `value` into the field of the same name of an empty message."""
    for name in _names(type(value)):
        item = getattr(value, name)
        if not item or name in skip:  # zero and nothing are what an empty message has
            continue
        if isinstance(item, (str, int, float, bytes)):
            setattr(message, name, item)
        elif not isinstance(item, tuple):
            getattr(message, name).SetInParent()
            fill(getattr(message, name), item)
        else:
            target = getattr(message, name)
            if dataclasses.is_dataclass(item[0]):
                for part in item:
                    fill(target.add(), part)
            else:
                target.extend(item)


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """Without the cache `dataclasses.fields` alone takes a third of the time."""
    return tuple(f.name for f in dataclasses.fields(kind))


def decode(kind: type[T], message: Message) -> T:
    """The dataclass `kind` from the message with its fields; undoes `fill`."""
    return _build(kind, message, {})


def _build(kind: type, message: Message, given: dict[str, object]):
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in given:
            values[f.name] = given[f.name]
            continue
        item, hint = getattr(message, f.name), hints[f.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            item = _build(hint, item, {})
        elif typing.get_origin(hint) is tuple:
            part: type = typing.get_args(hint)[0]
            item = tuple(_build(part, x, {}) if dataclasses.is_dataclass(part) else x for x in item)
        values[f.name] = item
    return kind(**values)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
