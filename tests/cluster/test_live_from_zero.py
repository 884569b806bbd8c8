"""The first instance of a model at zero, on a worker that does not keep its copy: live, it runs prompts behind the
parameters that arrive; with live=off it takes none before they are there. The tokens are the same. Workers take the
branches of GPUs: parameters are copied to devices, and copies read back from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import gpu_worker
import pytest
from rig import caught, written

from blitzjax import config as configs
from blitzjax.serve.client import Client, Result
from blitzjax.serve.local import LocalCluster
from test_models_from_zero import SPECS

PROMPTS = [list(range(45)), [7, 5, 3]]  # as many as an instance has slots


class Pair:
    """Two models, each kept by one of two workers."""

    def __init__(self, cluster: LocalCluster):
        self.client: Client = cluster.client()
        self.event_log = Path(cluster.config.serve.event_log)
        self._senders = ThreadPoolExecutor(len(PROMPTS))

    def ask(self, model: str) -> list[Future[Result]]:
        return [self._senders.submit(self.client.generate, prompt, model=model, max_tokens=6, ignore_eos=True,
                                     timeout_s=300.0) for prompt in PROMPTS]

    def scale(self, target: int, model: str) -> None:
        self.client.scale(target, model=model, live="off", wait=True, timeout_s=300)

    def kept(self) -> dict[str, str]:
        """Models by the worker that keeps them, once all are kept: what drains keeps its copy a moment after nobody serves."""
        deadline = time.monotonic() + 60
        while True:
            kept = [(m.host_copy, m.name) for m in self.client.status().models]
            if all(worker for worker, _ in kept):
                return dict(kept)
            assert time.monotonic() < deadline, kept
            time.sleep(0.01)

    def phase(self, worker: str) -> str:
        return next(i.phase for i in self.client.status().instances if i.id == worker)

    def log(self) -> list[dict[str, object]]:
        """Events and commands so far."""
        return [json.loads(line) for line in self.event_log.read_text().rpartition("\n")[0].splitlines()[1:]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directories = written(tmp_path_factory, SPECS)
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", "scale.min_instances=0", "cluster.pool=2", "cluster.threads=1",
        "engine.dtype=float32", "engine.max_model_len=64", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=32",
        "transfer.chunk_bytes=1024", f"serve.event_log={tmp_path_factory.mktemp('log') / 'events.jsonl'}",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, directories, gpu_worker.LAUNCH) as cluster:
        cluster.wait_ready(300)
        yield Pair(cluster)
        assert cluster.stop() == 0, cluster.tail("controller")


@pytest.fixture(scope="module")
def expected(pair: Pair) -> dict[str, list[tuple[int, ...]]]:
    """From an instance that is the copy itself, and whole before it takes anything."""
    answers = {}
    for spec in SPECS:
        pair.scale(1, spec.name)
        answers[spec.name] = [answer.result().token_ids for answer in pair.ask(spec.name)]
        pair.scale(0, spec.name)
    return answers


@pytest.mark.parametrize("live", ["zigzag", "off"])
def test_prompts_run_behind_the_loader_where_nobody_serves(pair: Pair, expected, live: str) -> None:
    def once() -> bool:
        kept = pair.kept()
        if len(kept) == 1:  # one is made again, with the worker that keeps none
            for target in (1, 0):
                pair.scale(target, *kept.values())
            return False
        busy, woken = kept["i0"], kept["i1"]
        pair.scale(2, busy)
        pair.scale(1, busy)
        if pair.phase("i1") != "serving":  # i0 was still busy with its sending
            pair.scale(0, busy)
            return False
        # i0 has drained: i1 serves one model and keeps the other
        begun = len(pair.log())
        pair.client.scale(1, model=woken, live=live)
        answers = pair.ask(woken)
        assert [answer.result().token_ids for answer in answers] == expected[woken]
        records = pair.log()[begun:]
        loaded = [r["units"] for r in records if r.get("event") == "LayerLoaded" and r["instance"] == "i0"]
        assert len(loaded) > 2, "the parameters came from i1, unit by unit"
        whole = next(n for n, r in enumerate(records) if r.get("event") == "TransferEnded" and r["instance"] == "i0")
        assigned = [n for n, r in enumerate(records) if r.get("command") == "Assign"]
        assert len(assigned) == len(PROMPTS), "every prompt was run once"
        assert not any(r.get("command") == "StartLive" for r in records), "there was nobody to help"
        for model in (woken, busy):
            pair.scale(0, model)
        if live == "off":
            assert min(assigned) > whole
        return live == "off" or max(assigned) < whole  # all were taken while parameters arrived

    assert caught(once)
