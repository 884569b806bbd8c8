from __future__ import annotations

import dataclasses
import tracemalloc
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blitzjax import commands, events, types
from blitzjax.commands import Command
from blitzjax.engine.messages import Decoded, KVOffer, Tokens
from blitzjax.serve import codec, eventlog
from blitzjax.serve.node import encoded
from blitzjax.v1 import worker_pb2 as pb

_I32 = st.integers(-(2**31), 2**31 - 1)
_INTS = {"seed": st.integers(0, 2**63 - 1), "uuid": st.integers(0, 2**64 - 1), "kv_bytes": st.integers(0, 2**63 - 1)}
_FLOAT32 = st.floats(width=32, allow_nan=False)  # floats of these travel as float
_NARROW = (types.Sampling, types.TokenLogprob)
_SHELL_ONLY = (events.RequestArrived, events.RequestCancelled, events.InstanceLost, events.ModelDeployed,
               events.ModelUndeployed, events.ScaleRequested, events.Ticked)
EVENTS = [e for e in typing.get_args(events.Event) if e not in _SHELL_ONLY]
COMMANDS = [c for c in typing.get_args(commands.Command) if c not in (commands.Reject, commands.Assign)]


def values(kind: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: _value(f.name, hints[f.name], kind) for f in dataclasses.fields(kind)})


def _value(name: str, hint: object, owner: type) -> st.SearchStrategy:
    if dataclasses.is_dataclass(hint):
        return values(hint)
    if typing.get_origin(hint) is tuple:
        return st.lists(_value(name, typing.get_args(hint)[0], owner), max_size=3).map(tuple)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is not None:  # X | None
        return st.one_of([_value(name, a, owner) for a in typing.get_args(hint) if a is not type(None)] + [st.none()])
    simple = {int: _INTS.get(name, _I32), str: st.text(max_size=8), bool: st.booleans(),
              float: _FLOAT32 if owner in _NARROW else st.floats(allow_nan=False)}
    return simple[hint]


@pytest.mark.parametrize("kind", EVENTS, ids=lambda k: k.__name__)
def test_every_worker_event_survives_the_wire(kind):
    @settings(max_examples=30, deadline=None)
    @given(values(kind))
    def check(event):
        wire = codec.encode_event(event).SerializeToString()
        assert codec.decode_event(pb.WorkerEvent.FromString(wire)) == event

    check()


@settings(max_examples=50, deadline=None)
@given(values(Tokens), values(Decoded))
def test_what_a_worker_says_of_answers_survives_the_wire(tokens, decoded):
    wires = [pb.WorkerEvent.FromString(encoded(said).SerializeToString()) for said in (tokens, decoded)]
    assert codec.decode(Tokens, wires[0].tokens) == tokens and codec.decode(Decoded, wires[1].decoded) == decoded


@settings(max_examples=30, deadline=None)
@given(values(KVOffer))
def test_an_offer_of_kv_survives_the_wire(offer):
    command = pb.WorkerCommand()
    codec.fill(command.kv_offer, offer)
    assert codec.decode(KVOffer, pb.WorkerCommand.FromString(command.SerializeToString()).kv_offer) == offer


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda k: k.__name__)
def test_every_command_survives_the_wire(kind):
    @settings(max_examples=30, deadline=None)
    @given(values(kind))
    def check(command):
        wire = codec.encode_command(command).SerializeToString()
        assert codec.decode_command(pb.WorkerCommand.FromString(wire), command.instance) == command

    check()


@settings(max_examples=50, deadline=None)
@given(values(types.Work), st.text(max_size=4))
def test_assign_travels_as_its_work(work, instance):
    message = codec.encode_command(commands.Assign(instance, work.request.id, work.attempt), work)
    assert codec.decode_command(pb.WorkerCommand.FromString(message.SerializeToString()), instance) == work


def test_messages_without_fields_are_still_told_apart():
    for command in (commands.Release("i0"), commands.CancelTransfer("i0", 0), commands.Abort("i0", "")):
        assert codec.decode_command(codec.encode_command(command), "i0") == command


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of([values(k) for k in typing.get_args(events.Event)]), max_size=5),
       st.lists(st.one_of([values(k) for k in typing.get_args(commands.Command)]), max_size=5))
def test_event_log_reads_back_what_was_written(tmp_path_factory, events, commands):
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    log = eventlog.EventLog(path, {"spec": {"name": "toy"}})
    for event in events:
        log.event(event)
    for command in commands:
        log.command(1.5, command)
    log.close()
    records = list(eventlog.read(path))
    assert [r.item for r in records] == [*events, *commands]
    assert [isinstance(r.item, Command) for r in records] == [False] * len(events) + [True] * len(commands)
    assert all(r.at == (1.5 if isinstance(r.item, Command) else r.item.at) for r in records)
    assert eventlog.read_header(path)["spec"] == {"name": "toy"}


def test_a_log_that_goes_on_behind_its_last_whole_line_is_not_read_into_memory(tmp_path):
    path, size = tmp_path / "events.jsonl", 64 << 20
    tick = events.Ticked(1.0)
    for unfinished in (b"", b'{"event":"Tick'):
        eventlog.EventLog(path, {"specs": []}).close()
        with path.open("ab") as file:
            file.write(b" " * size + b"\n" + unfinished)
        tracemalloc.start()
        log = eventlog.EventLog(path, {}, resume=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        log.event(tick)
        log.close()
        assert peak < size // 8 and path.stat().st_size > size
        assert path.read_bytes().splitlines()[2:] == [b'{"event":"Ticked","at":1.0}']
    (tmp_path / "new").touch()
    eventlog.EventLog(tmp_path / "new", {"specs": []}, resume=True).close()
    assert eventlog.read_header(tmp_path / "new")["specs"] == []
