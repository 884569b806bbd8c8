"""What a worker makes of a controller that comes back, or speaks of a model which is not there, or of an engine that is
stuck. Real stages.
"""

from __future__ import annotations

import json
import os
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from blitzjax import commands, config as configs, events
from blitzjax.engine.convert import TINY, write_random
from blitzjax.engine.stages import Stages
from blitzjax.errors import ConfigError
from blitzjax.serve import codec, sessions
from blitzjax.serve.hosts import free_ports
from blitzjax.serve.model import load_model
from blitzjax.serve.node import Node
from blitzjax.serve.replica import message_of
from blitzjax.serve.sessions import Outbox
from blitzjax.transfer import compat
from blitzjax.types import Request, Sampling, Work
from blitzjax.v1 import worker_pb2 as pb

CONFIG = ("engine.dtype=float32", "engine.max_model_len=16", "engine.max_num_seqs=1", "engine.share_executables=false",
          "engine.max_num_batched_tokens=16", "engine.prefix_caching=false", "cluster.heartbeat_s=600")


def configured(tmp_path: Path, *overrides: str) -> pb.Configure:
    """For two models."""
    models = []
    for name in ("m0", "m1"):
        write_random(tmp_path / name, replace(TINY, layers=2), seed=1)
        models.append(message_of(load_model(tmp_path / name, name)))
    config = configs.load(None, (*CONFIG, f"engine.executable_cache={tmp_path.parent / 'executables'}", *overrides))
    return pb.Configure(instance="i0", models=models, config_json=json.dumps(configs.to_tables(config)))


@contextmanager
def worker(configure: pb.Configure) -> Iterator[Node]:
    """The only one of its world."""
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    service = compat.start_coordination_service(address, 1, 600.0)
    node = Node(configure, Namespace(host_ip="127.0.0.1", leaf="", core=None, coordinator=address, rank=0, world=1))
    try:
        yield node
    finally:
        while not node.world.joined:
            time.sleep(0.05)
        node.world.leave()
        service.shutdown()


def said(outbox: Outbox) -> events.Event:
    return codec.decode_event(next(iter(outbox)))


def test_a_worker_forgets_what_was_undeployed_while_it_had_no_controller(tmp_path: Path) -> None:
    """A load of what is not there ends, and the next one is not held up."""
    configure = configured(tmp_path)
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        assert said(outbox).models == ("m0", "m1")
        node.detach(outbox)
        del configure.models[0]
        outbox = Outbox()
        node.attach(configure, outbox)
        assert said(outbox).models == ("m1",)
        node.obey(commands.CancelTransfer("i0", 2))  # meant for what another controller had begun under this number
        node.obey(commands.LoadFromDisk("i0", 1, 0, "m0"))
        node.obey(commands.LoadFromDisk("i0", 2, 0, "m1"))
        ended: dict[int, tuple[int, str]] = {}
        while len(ended) < 2:
            if isinstance(event := said(outbox), events.TransferEnded):
                ended[event.ticket] = event.units, event.error
    assert ended == {1: (0, "m0 is not here"), 2: (2 + 2, "")}


def test_a_worker_that_has_a_controller_is_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LEAVE_S", 0.1)
    configure, other = configured(tmp_path), pb.Configure()
    configure.session = "mine/1"
    other.CopyFrom(configure)
    other.session = "another's/1"
    del other.models[:]
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        with pytest.raises(ConfigError, match="i0 belongs to another controller"):
            node.attach(other, Outbox())
        obeyed: list[commands.Command] = []
        monkeypatch.setattr(node, "obey", obeyed.append)
        node.take(codec.encode_command(commands.Release("i0", False)), outbox)
        assert len(obeyed) == 1 and said(outbox).models == ("m0", "m1")
        monkeypatch.setattr(sessions, "_LEAVE_S", 300.0)
        attaching = threading.Thread(target=node.attach, args=(other, later := Outbox()))
        attaching.start()  # comes before it is noticed that the first one was killed
        node.detach(outbox)
        attaching.join()
        assert said(later).models == ()


def test_what_an_engine_says_of_requests_that_it_is_to_forget_is_no_part_of_the_next_session(tmp_path: Path) -> None:
    """It was in a step when its worker got the next controller, which knows that it has no requests."""
    configure = configured(tmp_path)
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        node.obey(commands.LoadFromDisk("i0", 1, 0, "m1"))
        while not isinstance(said(outbox), events.TransferEnded):
            pass
        engine = node._models["m1"].instance
        emit, in_step, go_on = engine._emit, threading.Event(), threading.Event()

        def late(output: object) -> None:
            in_step.set()
            assert go_on.wait(60)
            emit(output)

        engine._emit = late
        node.obey(work("old"))
        assert in_step.wait(60)
        node.detach(outbox)
        node.attach(configure, later := Outbox())
        go_on.set()
        node.obey(work("new"))
        first = said(later)
        assert isinstance(first, events.InstanceJoined) and first.model == "m1"
        heard: set[str] = set()
        for message in later:
            heard |= {message.tokens.request_id, message.prefill_done.request_id, message.request_finished.request_id,
                      *message.decoded.request_ids}
            if message.WhichOneof("event") == "request_finished":
                break
    assert heard == {"", "new"}


def work(name: str) -> Work:
    """A prompt of 3 tokens, for 2 more of m1."""
    return Work(Request(name, "m1", 3, 2, 0.0), 1, (1, 2, 3), (), Sampling(max_tokens=2))


def test_an_engine_can_speak_while_a_grammar_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one reads the tokenizer, or asks other workers for it."""
    configure = configured(tmp_path)
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        engine, spoke = node._models["m1"].instance, []

        def prepare(grammar: str) -> None:
            speaking = threading.Thread(target=node._emit, args=(events.LiveDrained(0.0, "i0"),), daemon=True)
            speaking.start()
            speaking.join(10)
            spoke.append((grammar, not speaking.is_alive()))

        monkeypatch.setattr(engine._grammars, "prepare", lambda grammar: spoke or prepare(grammar))
        item = replace(work("r"), sampling=Sampling(max_tokens=2, grammar="a grammar"))
        node.take(codec.encode_command(commands.Assign("i0", "r", 1), item), outbox)
        assert spoke == [("a grammar", True)]
        monkeypatch.undo()


def test_a_session_is_resumed_while_a_model_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = configured(tmp_path)
    configure.session = "journal/1"
    later = configure.models.pop()
    compiling, compiled = threading.Event(), threading.Event()
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        assert said(outbox).models == ("m0",)
        monkeypatch.setattr(Stages, "compile_all", lambda *_: compiling.set() or compiled.wait())
        node.take(pb.WorkerCommand(deploy=later), outbox)
        compiling.wait()
        node.detach(outbox)
        configure.models.append(later)
        configure.resume, configure.received = True, 1
        outbox = Outbox()
        attaching = threading.Thread(target=node.attach, args=(configure, outbox))
        attaching.start()
        attaching.join(30)
        resumed = not attaching.is_alive()
        compiled.set()
        attaching.join()
        assert resumed and next(iter(outbox)).resumed.taken == 1
        monkeypatch.undo()


def test_a_model_that_is_to_go_before_it_is_compiled_is_not_said_to_be_ready(tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one of that name may be another model."""
    configure = configured(tmp_path)
    first, second = configure.models.pop(), pb.Model()
    write_random(tmp_path / "second", replace(TINY, layers=2), seed=2)
    second.CopyFrom(message_of(load_model(tmp_path / "second", "m1")))
    go_on, compile_all = threading.Event(), Stages.compile_all
    with worker(configure) as node:
        outbox = Outbox()
        node.attach(configure, outbox)
        monkeypatch.setattr(Stages, "compile_all", lambda *args: go_on.wait(60) and compile_all(*args))
        for command in (pb.WorkerCommand(deploy=first), pb.WorkerCommand(undeploy=pb.Undeploy(model="m1")),
                        pb.WorkerCommand(deploy=second)):
            node.take(command, outbox)
        go_on.set()
        while not isinstance(said(outbox), events.ModelReady):
            pass
        assert node._holders["m1"].checkpoint == tmp_path / "second"
        monkeypatch.undo()


def test_a_worker_whose_engine_is_stuck_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:
    """It would answer pings for ever. An engine that rests, or is busy, is not stuck."""
    ended, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    configure = configured(tmp_path, "engine.step_timeout_s=1.0")
    del configure.models[0]
    with worker(configure) as node:
        engine = node._models["m1"].instance
        assert not ended.wait(1.3)
        monkeypatch.setattr(engine, "_step", lambda: time.sleep(0.01) or True)
        engine.forget_requests()
        assert not ended.wait(1.3)
        monkeypatch.setattr(engine, "_step", lambda: not go_on.wait())  # a device that hangs, say
        assert ended.wait(300)
        go_on.set()
    assert "a step of m1 has taken more than 1 s" in caplog.text
