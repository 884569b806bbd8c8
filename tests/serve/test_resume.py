"""A controller dies and another one takes over: nothing is lost, nothing comes twice, nobody else notices.

Controllers and toy workers run in this process. A dead controller is one whose tasks were cancelled and whose journal
is what had reached the file by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import shutil
from pathlib import Path

import grpc
import pytest
from toy import toy_config
from toy_worker import ToyWorker

from blitzjax.config import Config
from blitzjax.errors import ConfigError, InvalidRequest, Unavailable
from blitzjax.serve import journal as journals
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.controller import Controller
from blitzjax.serve.links import WORKER_SERVER_OPTIONS
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.serve.rejoin import Rejoin, Server
from blitzjax.serve.resume import with_journal
from blitzjax.serve.sessions import Session
from blitzjax.types import Phase, Sampling
from blitzjax.v1 import inference_pb2, worker_pb2_grpc
from blitzjax.v1 import worker_pb2 as pb

STEP = 0.01  # pause of a toy worker before a token, in seconds


def order(request_id: str, first: int, tokens: int = 40, n: int = 1, step: float = STEP, **fields) -> Order:
    return Order(**{"request_id": request_id, "model": "toy", "prompt": (first,), "priority": 0, "n": n, "echo": None,
                    "stop": (), "sampling": Sampling(max_tokens=tokens, temperature=step, logprobs=1)} | fields)


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

    async def __aenter__(self) -> Toys:
        for k, worker in enumerate(self.workers):
            server = grpc.aio.server(options=WORKER_SERVER_OPTIONS)
            worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
            self._addresses[f"i{k}"] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._servers.append(server)
        return self

    async def __aexit__(self, *exc) -> None:
        if self._running is not None:
            await self.crash()
        for server in self._servers:
            await server.stop(0)

    def start(self) -> Controller:
        self.controller = with_journal(lambda: Controller(self.config, self.model, self._addresses), self.journal)
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

    async def restart(self) -> Controller:
        await self.crash()
        return self.start()

    async def serving(self, count: int) -> None:
        await eventually(lambda: self.controller.serving == count)


def in_a_loop(test):
    """An async test."""
    return functools.wraps(test)(lambda *args, **kwargs: asyncio.run(test(*args, **kwargs)))


async def eventually(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def ended(*answers: Answer) -> None:
    await eventually(lambda: all(a.ended for a in answers))


@pytest.fixture
def toys(model_dir: Path, tmp_path: Path):
    return lambda *overrides: Toys(toy_config("serve.resume_timeout_s=2.0", *overrides), load_model(model_dir), tmp_path)


@in_a_loop
async def test_requests_run_on_while_no_controller_is_there(toys):
    async with toys() as world:
        controller = world.start()
        await world.serving(1)
        orders = [order(f"r{k}", k) for k in range(6)]  # four slots: two wait
        [first, *_] = [controller.submit(o)[0] for o in orders]
        await eventually(lambda: len(first.generated) > 5)
        await world.crash()
        await asyncio.sleep(0.6)  # the first four end now
        controller = world.start()
        answers = [controller.submit(o, resume=True)[0] for o in orders]
        await ended(*answers)
        for k, answer in enumerate(answers):
            piece = answer.take()
            assert piece.token_ids == answer.generated == answered(k, 40)
            assert [p.logprob for p in piece.logprobs] == [-t for t in answer.generated]
            assert (answer.finish_reason, answer.attempts) == ("length", 1)


@pytest.mark.parametrize("seed", range(3))
@in_a_loop
async def test_crashes_at_any_moment(toys, seed: int):
    rng = random.Random(seed)
    async with toys("serve.resume_timeout_s=5.0") as world:
        world.start()
        orders = [order(f"r{k}", k, tokens=rng.randrange(1, 60), n=rng.choice((1, 1, 3))) for k in range(16)]
        for o in orders:
            world.controller.submit(o)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.1)
            if rng.random() < 0.4:
                world.controller.scale(rng.choice((1, 2)), None, None)
            if rng.random() < 0.5:
                await world.restart()
        known = world.controller.replica.orders
        answers = [(o, known.claim(o) or known.answers(o.request_id)) for o in orders]
        await ended(*(a for _, group in answers for a in group))
        for o, group in answers:
            assert len(group) == o.n
            for a in group:
                assert a.generated == answered(o.prompt[0], o.sampling.max_tokens)
                assert a.attempts == 1
        world.controller.replica.cluster.check()
