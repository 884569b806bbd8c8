"""Two real models over three workers: from zero and back, one host copy each, counted where the bytes are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import grpc
import pytest
from rig import PATIENT, lost, written

from blitzjax import config as configs
from blitzjax.engine.convert import TINY
from blitzjax.engine.params import layout
from blitzjax.errors import UnknownModel
from blitzjax.serve.client import Result
from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

SPECS = (replace(TINY, name="left", layers=6), replace(TINY, name="right", layers=4, ffn_dim=192))
BYTES = {spec.name: sum(layout(spec, unit, 1).slab_bytes for unit in range(spec.units)) for spec in SPECS}
POOL = 3
Answers: TypeAlias = list[tuple[str, list[int], Future[Result]]]
T = TypeVar("T")


class Pool:
    """The cluster, and what its workers hold."""

    def __init__(self, cluster: LocalCluster):
        self.cluster, self.client = cluster, cluster.client()
        self._senders = ThreadPoolExecutor(32)
        self._known: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}

    def send(self, model: str, prompt: list[int]) -> Future[Result]:
        return self._senders.submit(self.client.generate, prompt, model=model, max_tokens=6, ignore_eos=True,
                                    timeout_s=300.0)

    def right(self, model: str, prompt: list[int], answer: Future[Result]) -> bool:
        """The same tokens as ever."""
        tokens = answer.result().token_ids
        return self._known.setdefault((model, tuple(prompt)), tokens) == tokens

    def held(self) -> dict[str, list[pb.Holding]]:
        """Model → what every worker that is up says it holds of it."""
        found: dict[str, list[pb.Holding]] = {}
        for address in self.cluster.worker_addresses:
            with grpc.insecure_channel(address) as channel:
                call = rpc.WorkerStub(channel).Run(iter([pb.WorkerCommand(inspect=pb.Inspect())]), timeout=300)
                for holding in next(call).holdings.holdings:
                    found.setdefault(holding.model, []).append(holding)
        return found

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not {what} after {timeout_s:g} s: {self.client.status()}"
            time.sleep(0.05)

    def back_to_zero(self) -> None:
        """Nobody asks any more: who was woken now would stay."""
        for spec in SPECS:
            self.client.scale(0, model=spec.name)
        self.settle_at_zero()

    def settle_at_zero(self) -> None:
        """Every worker is idle in the world, and each model is in one memory, whole: its host copy."""
        self.wait(lambda: all(i.phase == "idle" and i.in_world for i in self.client.status().instances)
                  and len(self.client.status().instances) == self.cluster.config.cluster.pool
                  and all(m.host_copy and not m.copying for m in self.client.status().models), "at zero")
        self.wait(lambda: self.one_copy_each(), "one copy each")

    def one_copy_each(self) -> bool:
        try:
            held = self.held()
            return held.keys() == BYTES.keys() and all([(h.bytes, h.copy) for h in holdings] == [(BYTES[model], True)]
                                                       for model, holdings in held.items())
        except grpc.RpcError:
            return False

    def kill(self, *workers: int) -> None:
        """Returns when the controller has noticed."""
        told = len(self.lost())
        for worker in workers:
            self.cluster.signal_worker(worker)
        self.wait(lambda: {f"i{worker}" for worker in workers} <= set(self.lost()[told:]), "down")

    def lost(self) -> list[str]:
        return lost(Path(self.cluster.config.serve.event_log))

    def keeper(self, model: str) -> int:
        return next(int(m.host_copy[1:]) for m in self.client.status().models if m.name == model)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    directories = written(tmp_path_factory, SPECS)
    config = configs.load(None, (
        "serve.port=0", "scale.min_instances=0", "scale.zero_after_s=1.0", "scale.down_after_s=600",
        f"cluster.pool={POOL}", "scale.max_instances=1", "cluster.threads=1", "engine.dtype=float32",
        "engine.max_model_len=64", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=32",
        "transfer.chunk_bytes=2048", "transfer.collective_timeout_s=3.0", *PATIENT,
        f"serve.event_log={tmp_path_factory.mktemp('log') / 'events.jsonl'}",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, directories[0]) as cluster:
        cluster.wait_ready(300)
        pool = Pool(cluster)
        pool.wait(lambda: len(pool.client.status().instances) == POOL, "joined")
        pool.client.deploy(directories[1], timeout_s=300)
        pool.settle_at_zero()
        yield pool
        assert cluster.stop() == 0, cluster.tail("controller")


def ask(pool: Pool, count: int = 6) -> Answers:
    """Both models at once."""
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(rng.choice([3, 20, 40, 55]))] for _ in range(count)]
    return [(spec.name, prompt, pool.send(spec.name, prompt)) for prompt in prompts for spec in SPECS]


def all_right(pool: Pool, answers: Answers) -> bool:
    return all(pool.right(*answer) for answer in answers)


def in_the_middle_of_a_scale_up(pool: Pool, begin: Callable[[], T], middle: Callable[[], bool]) -> tuple[T, Answers]:
    """Left scales from zero to three while both are asked. → what `begin` said, and the answers under way. A busy
    machine may miss the middle: then once more.
    """
    for _ in range(10):
        begun = begin()
        pool.client.scale(3, model="left")
        answers = ask(pool)
        pool.wait(lambda: middle() or not loading(pool) and all(a.done() for *_, a in answers), "in the middle")
        if middle():
            return begun, answers
        assert all_right(pool, answers)
        pool.back_to_zero()
    raise AssertionError("every scale-up was over before it was seen")


def loading(pool: Pool, at_least: int = 0) -> bool:
    """An instance still loads, and has so many layers."""
    return any(i.phase in ("loading", "live") and i.layers_loaded >= at_least for i in pool.client.status().instances)


def test_both_models_answer_from_zero_and_go_back(pool: Pool) -> None:
    """The first one: the policy leaves what others ask for alone, for `down_after_s`."""
    assert pool.keeper("left") != pool.keeper("right")
    answers = ask(pool)
    assert all_right(pool, answers)
    assert answers[0][2].result().token_ids != answers[1][2].result().token_ids  # another model
    pool.settle_at_zero()
    assert all_right(pool, ask(pool))
    pool.settle_at_zero()


def test_the_copy_becomes_an_instance_and_seeds_the_others(pool: Pool) -> None:
    pool.client.scale(POOL, model="left", wait=True, timeout_s=300)
    held = pool.held()["left"]
    assert len(held) == POOL and not any(h.copy for h in held)
    assert all_right(pool, ask(pool))
    pool.back_to_zero()


def test_a_worker_that_keeps_a_copy_is_killed(pool: Pool) -> None:
    victim = pool.keeper("right")
    pool.kill(victim)
    pool.wait(lambda: any(m.name == "right" and m.host_copy not in ("", f"i{victim}") and not m.copying
                          for m in pool.client.status().models), "kept by another worker")
    assert all_right(pool, ask(pool))
    pool.back_to_zero()


def test_a_worker_is_killed_while_its_copy_becomes_many_instances(pool: Pool) -> None:
    source, answers = in_the_middle_of_a_scale_up(pool, lambda: pool.keeper("left"), lambda: loading(pool, at_least=1))
    pool.kill(source)
    assert all_right(pool, answers)
    pool.back_to_zero()


def test_an_undeployed_model_is_in_no_memory(pool: Pool) -> None:
    stream = pool.client.stream([1, 2, 3], model="left", max_tokens=60, ignore_eos=True, timeout_s=300.0)
    first = next(stream)
    pool.client.undeploy("left", timeout_s=300)
    assert sum(len(chunk.token_ids) for chunk in [first, *stream]) == 60  # what it had accepted it finished
    pool.wait(lambda: [m.name for m in pool.client.status().models] == ["right"] and "left" not in pool.held(), "gone")
    with pytest.raises(UnknownModel):
        pool.client.generate([1], model="left")
