"""A controller dies and another one takes over, or goes on over new connections: nothing is lost, nothing comes twice.

Controllers and toy workers run in this process. A dead controller is one whose tasks were cancelled and whose journal
is what had reached the file by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from proxy import Proxy
from toy import RESUME_S, SPEC, toy_config, write_model
from toy_worker import ToyWorker

from blitzjax.config import Config
from blitzjax.errors import ConfigError, InvalidRequest, Unavailable, UnknownModel
from blitzjax.events import TransferEnded
from blitzjax.serve import deployments, links
from blitzjax.serve import journal as journals
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.controller import Controller
from blitzjax.serve.channels import WORKER_SERVER
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.serve.replica import Replica
from blitzjax.serve.resume import compact, replay, with_journal
from blitzjax.serve.sessions import Session
from blitzjax.types import Phase, Sampling
from blitzjax.v1 import worker_pb2_grpc
from blitzjax.v1 import worker_pb2 as pb

STEP = 0.01  # pause of a toy worker before a token, in seconds


def order(request_id: str, first: int, tokens: int = 40, n: int = 1, step: float = STEP, **fields) -> Order:
    return Order(**{"request_id": request_id, "model": "toy", "prompt": (first,), "priority": 0, "n": n, "echo": None,
                    "stop": (), "sampling": Sampling(max_tokens=tokens, temperature=step, logprobs=first % 2 * 2 - 1)}
                 | fields)


def answered(first: int, tokens: int) -> list[int]:
    return [(first + 1 + k) % 258 for k in range(tokens)]


class Toys:
    """Two toy workers, and the controllers of one journal, one after the other."""

    def __init__(self, config: Config, model: ServedModel, directory: Path):
        self.config, self.model, self.journal = config, model, directory / "journal"
        self.controller: Controller | None = None
        self.workers = [ToyWorker(), ToyWorker()]
        self._addresses: dict[str, str] = {}
        self._servers: list[grpc.aio.Server] = []
        self._running: asyncio.Task[None] | None = None
        self._proxies: list[Proxy] = []

    async def __aenter__(self) -> Toys:
        for k, worker in enumerate(self.workers):
            server = grpc.aio.server(options=WORKER_SERVER)
            worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
            self._addresses[f"i{k}"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._servers.append(server)
        return self

    def proxied(self) -> None:
        """Controllers that start now reach the workers through proxies."""
        self._proxies = [Proxy(address) for address in self._addresses.values()]
        self._addresses = dict(zip(self._addresses, (proxy.address for proxy in self._proxies), strict=True))

    def cut(self, silent: bool) -> None:
        for proxy in self._proxies:
            proxy.cut(silent)

    async def __aexit__(self, *exc) -> None:
        for proxy in self._proxies:
            proxy.close()
        if self._running is not None:
            await self.crash()
        for server in self._servers:
            await server.stop(0)

    def start(self) -> Controller:
        self.controller = with_journal(lambda: Controller(self.config, [self.model], self._addresses), self.journal)
        self._running = asyncio.create_task(self.controller.run())
        return self.controller

    async def crash(self) -> None:
        """What is not in the file by now is gone."""
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        left = self.journal.with_name("left")
        shutil.copy(self.journal, left)
        self.controller.close()
        self._running = None
        left.rename(self.journal)

    def compact(self) -> None:
        compact(self.controller.journal, self.controller.now(), self.controller.replica)

    def replayed(self) -> Replica:
        """What the journal leads to now."""
        self.controller.journal.flush()
        replica = Controller(self.config, [self.model], self._addresses).replica
        assert replay(replica, self.journal).due == []
        return replica

    async def restart(self) -> Controller:
        await self.crash()
        return self.start()

    async def serving(self, count: int) -> None:
        await eventually(lambda: [i.phase for i in self.controller.status().instances].count(Phase.SERVING) == count)


def in_a_loop(test):
    """An async test."""
    return functools.wraps(test)(lambda *args, **kwargs: asyncio.run(test(*args, **kwargs)))


async def eventually(condition, timeout_s: float = 300.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def ended(*answers: Answer) -> None:
    await eventually(lambda: all(a.ended for a in answers))


@pytest.fixture
def toys(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers that live answer, if late."""
    monkeypatch.setattr(links, "_RESUME_S", 100.0)
    return lambda *overrides: Toys(toy_config(*overrides), load_model(model_dir), tmp_path)


@in_a_loop
async def test_requests_run_on_while_no_controller_is_there(toys):
    async with toys() as world:
        controller = world.start()
        await world.serving(1)
        orders = [order(f"r{k}", k) for k in range(6)]  # four slots: two wait
        [first, *_] = [controller.submit(o)[0] for o in orders]
        await eventually(lambda: len(first.generated) > 5)
        await world.crash()
        await eventually(lambda: not any(w.busy for w in world.workers))  # the first four have ended
        controller = world.start()
        answers = [controller.submit(o, resume=True)[0] for o in orders]
        await ended(*answers)
        for k, answer in enumerate(answers):
            piece = answer.take()
            assert piece.token_ids == answer.generated == answered(k, 40)
            assert [p.logprob for p in piece.logprobs] == (k % 2) * [-t for t in answer.generated]
            assert (answer.finish_reason, answer.attempts) == ("length", 1)


@pytest.mark.parametrize("seed", range(3))
@in_a_loop
async def test_crashes_at_any_moment(toys, seed: int):
    rng = random.Random(seed)
    async with toys() as world:
        world.start()
        orders = [order(f"r{k}", k, tokens=rng.randrange(1, 60), n=rng.choice((1, 1, 3))) for k in range(16)]
        for o in orders:
            world.controller.submit(o)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.1)
            if rng.random() < 0.4:
                world.controller.scale("toy", rng.choice((1, 2)), None, None)
            if rng.random() < 0.3:
                world.compact()
            if rng.random() < 0.5:
                await world.restart()
        known = world.controller.replica.orders
        answers = [(o, known.claim(o, "") or known.answers(o.request_id)) for o in orders]
        await ended(*(a for _, group in answers for a in group))
        for o, group in answers:
            assert len(group) == o.n
            for a in group:
                assert a.generated == answered(o.prompt[0], o.sampling.max_tokens)
                assert a.attempts == 1
        world.controller.replica.cluster.check()
        again = world.replayed()
        assert again.cluster.status() == world.controller.status()
        for instance, link in again.links.items():
            assert replace(link.state(), unconfirmed=()) == replace(
                world.controller.replica.links[instance].state(), unconfirmed=())


@pytest.mark.parametrize("silent", [False, True])
@in_a_loop
async def test_a_worker_is_not_lost_with_its_connection(toys, silent: bool):
    """`silent`: the worker does not hear that it broke."""
    async with toys() as world:
        world.proxied()
        controller = world.start()
        await world.serving(1)
        orders = [order(f"r{k}", k) for k in range(6)]
        answers = [controller.submit(o)[0] for o in orders]
        for tokens in (1, 10, 25):
            await eventually(lambda: len(answers[0].generated) >= tokens)
            world.cut(silent)
        controller.scale("toy", 2, None, None)  # a command meanwhile is not lost
        await ended(*answers)
        await world.serving(2)
        for k, answer in enumerate(answers):
            assert (answer.generated, answer.attempts) == (answered(k, 40), 1)
        assert "InstanceLost" not in (world.journal.read_text(errors="replace")), "nobody was lost"


@in_a_loop
async def test_a_client_may_come_back_for_what_it_could_have_missed(toys):
    async with toys() as world:
        world.start()
        await world.serving(1)
        orders = [order("missed", 1, 3, step=0.0, echo="once more"), order("had", 2, 3, step=0.0)]
        [missed], [had] = map(world.controller.submit, orders)
        await ended(missed, had)
        world.controller.leave([had])
        assert not world.controller.busy
        await world.restart()
        for o, before in zip(orders, (missed, had), strict=True):
            [after] = world.controller.submit(o, resume=True)
            await ended(after)
            assert (after.finish_reason, after.generated) == ("length", before.generated)
            piece = after.take()
            assert piece.text == "".join(map(chr, before.generated))
            assert (piece.echo.text if piece.echo else None) == o.echo
        with pytest.raises(Unavailable, match="not known any more"):  # another client has claimed it
            world.controller.submit(orders[0], resume=True)
        world.controller.leave([after])
        world.controller.replica.orders.prune(world.controller.now() + RESUME_S + 1)
        assert world.controller.replica.orders.answers("had") == ()


@in_a_loop
async def test_an_id_belongs_to_one_request_also_after_a_restart(toys):
    async with toys() as world:
        world.start()
        await world.serving(1)
        world.controller.submit(order("mine", 1, 400))
        [left] = world.controller.submit(order("left", 3, 400))
        await eventually(lambda: left.generated)
        world.controller.leave([left])
        await world.restart()
        with pytest.raises(InvalidRequest, match="still running"):
            world.controller.submit(order("mine", 2, 400))
        with pytest.raises(Unavailable):
            world.controller.submit(order("left", 3, 400), resume=True)
        assert world.controller.submit(order("mine", 1, 400))[0].order.prompt == (1,)


@in_a_loop
async def test_nobody_comes_back(toys):
    async with toys("serve.resume_timeout_s=0.3") as world:
        world.start()
        await world.serving(1)
        world.controller.submit(order("r", 1, 400, step=1.0))  # longer than `eventually` waits
        await eventually(lambda: world.workers[0].busy or world.workers[1].busy)
        await world.restart()
        assert world.controller.busy
        await eventually(lambda: not world.controller.busy and not any(w.busy for w in world.workers))
        assert world.controller.submit(order("r", 2, 1))


@in_a_loop
async def test_no_controller_comes_back(toys):
    async with toys("serve.resume_timeout_s=0.3") as world:
        world.start()
        await world.serving(1)
        [answer] = world.controller.submit(order("r", 1, 150))
        await eventually(lambda: answer.generated)
        await world.crash()
        await eventually(lambda: not any(w.busy for w in world.workers))
        world.start()  # late, but it knows what was asked
        [answer] = world.controller.submit(order("r", 1, 150), resume=True)
        await ended(answer)
        assert (answer.generated, answer.attempts) == (answered(1, 150), 2)


@in_a_loop
async def test_a_worker_dies_while_no_controller_is_there(toys):
    async with toys() as world:
        world.start()
        await world.serving(1)
        world.controller.scale("toy", 2, None, None)
        await world.serving(2)
        orders = [order(f"r{k}", k, 120) for k in range(6)]
        answers = [world.controller.submit(o)[0] for o in orders]
        await eventually(lambda: all(a.generated for a in answers))
        await world.crash()
        world.workers[0].die()
        world.start()
        answers = [world.controller.submit(o, resume=True)[0] for o in orders]
        await ended(*answers)
        assert [a.generated for a in answers] == [answered(k, 120) for k in range(6)]
        assert {a.attempts for a in answers} == {1, 2}


@in_a_loop
async def test_a_load_that_fails_before_anything_serves_again_is_not_the_end(toys):
    """A chain breaks when one of its members dies. Only at the very beginning it must be the checkpoint."""
    async with toys() as world:
        controller = world.start()
        await world.serving(1)
        for instance in controller.links:
            controller.on_lost(instance, "it was killed")
        controller = await world.restart()
        await asyncio.sleep(0)
        assert not controller.ready
        controller.on_event(TransferEnded(controller.now(), "i0", 7, 0, "a chain broke"))
        await world.serving(1)


@in_a_loop
async def test_models_that_came_and_went_at_run_time(toys, tmp_path):
    """Also through a snapshot; workers are told once. Under names that are not their checkpoints'."""
    second, third = (load_model(write_model(tmp_path / name), name) for name in ("2nd", "3rd"))
    async with toys("cluster.pool=2") as world:
        world.start()
        await world.serving(1)
        world.controller.deploy(second, 1, None)
        world.controller.deploy(third, 0, None)
        await world.serving(2)
        await world.restart()
        await deployments.undeploy(world.controller, "3rd")
        [before] = world.controller.submit(order("r", 1, 60, model="2nd"))
        await eventually(lambda: before.generated)
        world.compact()
        await world.restart()
        assert list(world.controller.models) == ["toy", "2nd"]
        [answer] = world.controller.submit(order("r", 1, 60, model="2nd"), resume=True)
        await ended(answer)
        assert (answer.generated, answer.attempts) == (answered(1, 60), 1)
        assert all(set(worker.toy.specs) == {"toy", "2nd"} for worker in world.workers)


@in_a_loop
async def test_an_answer_of_a_model_that_is_undeployed_waits_for_its_client(toys, tmp_path):
    second = load_model(write_model(tmp_path / "2nd", spec=replace(SPEC, name="2nd")))
    async with toys() as world:
        world.start()
        await world.serving(1)
        world.controller.deploy(second, 1, None)
        await world.serving(2)
        [before] = world.controller.submit(order("r", 1, 60, model="2nd"))
        await eventually(lambda: before.generated)
        controller = await world.restart()
        await deployments.undeploy(controller, "2nd")
        assert list(controller.models) == ["toy"]
        for name in ("", "2nd"):
            assert controller.model_for(name, "r", "").spec == second.spec
        [answer] = controller.submit(order("r", 1, 60, model="2nd"), resume=True)
        assert (answer.generated, answer.finish_reason) == (answered(1, 60), "length")
        with pytest.raises(UnknownModel):
            controller.model_for("2nd", "other", "")


@pytest.mark.parametrize("name", ["", "other"])
def test_a_snapshot_changes_nothing_of_what_workers_are_told(model_dir, name):
    """They refuse a controller that names another model than the last one."""
    controller = Controller(toy_config(), [load_model(model_dir, name)], {"i0": "127.0.0.1:1"})
    told = controller.links["i0"].configure.SerializeToString()
    controller.replica.restore(controller.replica.snapshot())
    assert controller.links["i0"].configure.SerializeToString() == told


@in_a_loop
async def test_a_journal_does_not_grow_for_ever(toys, monkeypatch):
    monkeypatch.setattr(journals, "_SHORT_BYTES", 20_000)
    async with toys("serve.resume_timeout_s=0.01") as world:
        world.start()
        await world.serving(1)
        for k in range(30):
            answers = world.controller.submit(order(f"r{k}", k, 100, step=0.0))
            await ended(*answers)
            if k < 29:
                world.controller.leave(answers)
        await eventually(lambda: world.journal.stat().st_size < 200_000)  # of 500,000 that were written
        assert [s.finish_reason for s in world.replayed().orders.answers("r29")] == ["length"]


def test_what_cannot_be_resumed_is_put_aside(model_dir, tmp_path, caplog):
    path, model = tmp_path / "journal", load_model(model_dir)

    def start(*overrides: str) -> Controller:
        return with_journal(lambda: Controller(toy_config(*overrides), [model], {"i0": "127.0.0.1:1"}), path)

    def crash(controller: Controller) -> None:
        controller.submit(order("r", 1))
        left = path.read_bytes()
        controller.close()
        path.write_bytes(left)

    crash(start())
    assert start().busy  # as it should be
    with pytest.raises(ConfigError, match="still runs"):
        start()
    path.unlink()
    for spoil, why in ((lambda: None, "another config"), (lambda: path.write_text("{"), "Expecting property"),
                       (lambda: path.write_bytes(path.read_bytes().replace(b'"event":"Req', b'"event":"Not')), "NotuestA")):
        crash(start())
        spoil()
        assert not start("engine.page_size=8" if why == "another config" else "engine.page_size=16").busy
        assert "starting afresh" in caplog.text and why in caplog.text
        assert path.with_name("journal.unusable").exists()
        path.unlink()
    crash(start())
    path.write_bytes(path.read_bytes() + b'{"event":"Tick')  # its controller died while it wrote
    assert start().busy


def test_a_connection_obeys_only_the_last_controller():
    obeyed = []
    session = Session()

    def connect(since: float, outbox, resume: bool) -> bool:
        outbox.put = outbox.append
        return session.connect(pb.Configure(session="a/1", since=since, resume=resume), outbox, pb.WorkerEvent)

    class Outbox(list):
        put = None

    first, second = Outbox(), Outbox()
    assert connect(1.0, first, resume=False)
    session.take(first, pb.WorkerCommand(release={}), lambda: obeyed.append(1))
    session.put(pb.WorkerEvent(drained={}))
    assert not connect(2.0, second, resume=True)
    session.take(first, pb.WorkerCommand(release={}), lambda: obeyed.append("too late"))
    session.take(second, pb.WorkerCommand(release={}), lambda: obeyed.append(2))
    assert obeyed == [1, 2] and second[0].resumed.taken == 1 and [e.WhichOneof("event") for e in second[1:]] == [
        None, "drained"]
    with pytest.raises(ConfigError, match="later controller"):
        connect(1.5, first, resume=True)
    session.take(second, pb.WorkerCommand(received=2), lambda: obeyed.append("nothing"))
    assert connect(3.0, Outbox(), resume=True), "what was confirmed is forgotten: it must begin anew"
