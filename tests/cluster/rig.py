"""A real cluster: controller, coordination service, four workers, a tiny model. Small chunks make its multicast slow
enough to be interrupted: about 0.2 s a layer.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer

from blitzjax import config as configs
from blitzjax.engine.convert import TINY, write_random
from blitzjax.serve.asking import Result
from blitzjax.serve.local import LocalCluster
from blitzjax.types import ModelSpec
from blitzjax.v1 import inference_pb2 as pb

SPEC = replace(TINY, layers=8)
POOL = 4
PATIENT = ("transfer.handoff_timeout_s=60", "cluster.heartbeat_s=120", "serve.hang_timeout_s=120",
           "serve.resume_timeout_s=300")  # with who gets no time
TEMPLATE = ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}{{ m.content }};{% endfor %}"
            """{% if tools %}<tool_call>{"name": , "arguments": }</tool_call>{% endif %}""")


class Rig:
    """A cluster, a client of it, and what the tests wait for."""

    def __init__(self, cluster: LocalCluster):
        self.cluster, self.client = cluster, cluster.client()
        self.event_log = Path(cluster.config.serve.event_log)
        self._senders = ThreadPoolExecutor(32)

    def send(self, prompt: list[int], **options) -> Future[Result]:
        options = {"max_tokens": 8, "ignore_eos": True, "timeout_s": 300.0} | options
        return self._senders.submit(self.client.generate, prompt, **options)

    def wait(self, condition: Callable[[pb.ClusterStatus], bool], what: str,
             timeout_s: float = 300.0) -> pb.ClusterStatus:
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.client.status()):
            assert time.monotonic() < deadline, f"not {what} after {timeout_s:g} s: {describe(status)}"
            time.sleep(0.01)
        return status

    def scale(self, target: int, **modes) -> None:
        self.client.scale(target, **modes)

    def settle(self, serving: int) -> pb.ClusterStatus:
        """Exactly `serving` instances serve, all others are idle members of the world, nothing runs or waits."""
        return self.wait(lambda s: phases(s).count("serving") == serving and phases(s).count("idle") == POOL - serving
                         and all(i.in_world for i in s.instances) and not s.queued_requests and not s.running_requests
                         and not any(i.partner or i.pages_used for i in s.instances), f"settled at {serving}")

    def only(self, serving: int) -> pb.ClusterStatus:
        self.scale(serving, live="off", source="multicast")
        return self.settle(serving)

    def index(self, phase: str) -> int:
        """Worker number of the first instance in `phase`."""
        return next(int(i.id[1:]) for i in self.client.status().instances if i.phase == phase)

    def log(self) -> list[dict[str, object]]:
        """Events and commands so far."""
        return [json.loads(line) for line in self.event_log.read_text().rpartition("\n")[0].splitlines()[1:]]

    def whole_log(self) -> list[dict[str, object]]:
        """All that was decided before this call: the log is written in blocks."""
        mark = self.send([1], max_tokens=1).result().request_id
        self.wait(lambda s: mark in self.event_log.read_text(), "in the event log")
        return self.log()

    def lost(self) -> list[str]:
        return lost(self.event_log)

    def kill(self, worker: int) -> None:
        """SIGKILL. Returns when the controller has noticed, and another process is there."""
        name, before = f"i{worker}", self.cluster.worker_pid(worker)
        told = self.lost().count(name)
        self.cluster.signal_worker(worker)
        self.wait(lambda s: self.lost().count(name) > told and self.cluster.worker_pid(worker) not in (None, before),
                  f"noticed that {name} died")

    def pids(self) -> dict[int, int | None]:
        return {k: self.cluster.worker_pid(k) for k in range(POOL)}


def lost(event_log: Path) -> list[str]:
    """Instances, as often as they were lost so far."""
    return re.findall(r'"event":"InstanceLost","at":[^,]*,"instance":"(i\d+)"', event_log.read_text())


def caught(once: Callable[[], bool]) -> bool:
    """A busy machine may miss the moment that a test is about. `once` is all of the test, and says whether it caught it; not
    to have caught it ten times is a failure.
    """
    return any(once() for _ in range(10))


def phases(status: pb.ClusterStatus) -> list[str]:
    return [i.phase for i in status.instances]


def describe(status: pb.ClusterStatus) -> str:
    return f"queued {status.queued_requests} running {status.running_requests} target {status.target_instances} " + " ".join(
        f"{i.id}:{i.phase}:{i.layers_loaded}:{i.partner}:{i.waiting}+{i.running}:{'w' if i.in_world else '-'}"
        for i in status.instances)


def prompts(count: int, seed: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.choice([3, 20, 70, longest]))] for _ in range(count)]


def written(factory: pytest.TempPathFactory, specs: Sequence[ModelSpec]) -> list[Path]:
    """A checkpoint directory of random parameters for each."""
    directories = [factory.mktemp("models") / spec.name for spec in specs]
    for seed, (directory, spec) in enumerate(zip(directories, specs, strict=True)):
        write_random(directory, spec, seed=seed)
    return directories


@contextlib.contextmanager
def another(rig: Rig, model_dir: Path, place: Path, serving: int, **scale: object) -> Iterator[Rig]:
    """A cluster beside `rig` that differs in rows of [scale] only, with `serving` instances and its event log in `place`."""
    base = rig.cluster.config
    config = replace(base, scale=replace(base.scale, **scale),
                     serve=replace(base.serve, port=0, event_log=str(place / "events.jsonl")))
    with started(config, model_dir, serving) as other:
        yield other


@contextlib.contextmanager
def started(config: configs.Config, model_dir: Path, serving: int) -> Iterator[Rig]:
    with LocalCluster(config, model_dir) as cluster:
        cluster.wait_ready(300)
        rig = Rig(cluster)
        rig.settle(serving)
        yield rig


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models") / "tiny"
    write_random(directory, SPEC, seed=3)
    tags = {"<tool_call>": 258, "</tool_call>": 259}
    byte_tokenizer({"<|pad|>": 256, "<|eos|>": SPEC.eos_token_ids[0], **tags}).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="package")
def rig(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", f"cluster.pool={POOL}", "cluster.threads=1", "engine.dtype=float32",
        "engine.max_model_len=256", "engine.max_num_seqs=8", "engine.max_num_batched_tokens=64",
        "transfer.chunk_bytes=1024", "transfer.collective_timeout_s=3.0", *PATIENT,
        f"serve.event_log={tmp_path_factory.mktemp('log') / 'events.jsonl'}",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with started(config, model_dir, 1) as rig:
        yield rig


@pytest.fixture(scope="package")
def expected(rig: Rig) -> Callable[[list[int]], tuple[int, ...]]:
    """What a single instance answers, asked before anything is scaled."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    lock = threading.Lock()
    for prompt in prompts(48, seed=1):
        with lock:
            known[tuple(prompt)] = rig.send(prompt).result().token_ids
    return lambda prompt: known[tuple(prompt)]
