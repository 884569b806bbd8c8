"""Prompts on some workers, decoding on others: the tokens of a mixed instance, whatever is scaled and whoever dies.

The reference is the package's mixed cluster; a second one with split roles serves the same model.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from blitzjax.serve.client import Result
from blitzjax.v1 import inference_pb2 as pb
from rig import SPEC, Rig, another, caught, phases, prompts

LONG = 100  # tokens: answers are still being decoded when their instance dies
LETTERS = {"regex": "([a-z][0-9]){99}", "temperature": 0.9, "seed": 5}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.4}


@pytest.fixture(scope="module")
def split(rig: Rig, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with another(rig, model_dir, tmp_path_factory.mktemp("split"), 2, roles="split") as split:
        yield split


@pytest.fixture(scope="module")
def answers(rig: Rig) -> dict[int, tuple[list[int], dict[str, object], tuple[int, ...]]]:
    """Prompt, options and what a mixed instance answers."""
    rig.only(1)
    options = [{"max_tokens": LONG}, {"max_tokens": LONG, **SAMPLED}, {"max_tokens": LONG, **LETTERS}]
    asked = [(prompt, options[n % 3]) for n, prompt in enumerate(prompts(20, seed=11))]
    sent = [rig.send(prompt, **options) for prompt, options in asked]
    return {n: (*pair, f.result(300).token_ids) for n, (pair, f) in enumerate(zip(asked, sent, strict=True))}


class Burst:
    """Sends everything; the call waits for it, and every token is right."""

    def __init__(self, split: Rig, answers: dict):
        self._right = {n: tokens for n, (_, _, tokens) in answers.items()}
        self._sent: dict[int, Future[Result]] = {
            n: split.send(prompt, **options) for n, (prompt, options, _) in answers.items()}

    @property
    def over(self) -> bool:
        return all(future.done() for future in self._sent.values())

    def __call__(self) -> list[Result]:
        got = {n: future.result(300) for n, future in self._sent.items()}
        wrong = [n for n, result in got.items() if result.token_ids != self._right[n]]
        assert not wrong, [(n, got[n].token_ids, self._right[n], got[n].usage) for n in wrong]
        return list(got.values())


def roles(status: pb.ClusterStatus) -> list[str]:
    return sorted(i.role for i in status.instances if i.phase == "serving")


def received(status: pb.ClusterStatus) -> int:
    return sum(i.kv_received_bytes for i in status.instances)


def logged_bytes(split: Rig) -> int:
    whole_lines = Path(split.cluster.config.serve.event_log).read_text().rpartition("\n")[0].splitlines()
    return sum(line["kv_bytes"] for line in map(json.loads, whole_lines) if line.get("event") == "KVMigrated")


def worker(split: Rig, role: str) -> int:
    status = split.wait(lambda s: role in roles(s), f"there: {role}")
    return next(int(i.id[1:]) for i in status.instances if i.phase == "serving" and i.role == role)


def settle(split: Rig, prefill: int) -> pb.ClusterStatus:
    """`prefill` instances and one that decodes; nothing else holds parameters."""
    split.client.scale(prefill + 1, live="off", source="multicast")
    status = split.settle(prefill + 1)
    assert roles(status) == ["decode"] + ["prefill"] * prefill
    return status


def test_prompts_run_on_one_instance_and_are_decoded_on_the_other(split: Rig, answers) -> None:
    before = settle(split, 1)
    results = Burst(split, answers)()
    status = split.settle(2)
    assert all(result.usage.attempts == 1 for result in results)
    moved = {i.role: i.kv_received_bytes for i in status.instances if i.phase == "serving"}
    assert moved["decode"] > received(before) and moved["prefill"] == 0


def test_prefill_grows_live_under_a_burst(split: Rig, answers) -> None:
    def once() -> bool:
        before = settle(split, 1)
        split.scale(3, live="zigzag")
        split.wait(lambda s: any(i.phase == "live" and i.layers_loaded for i in s.instances)
                   or phases(s).count("serving") == 3, "live")
        results = Burst(split, answers)()
        status = split.settle(3)
        assert roles(status) == ["decode", "prefill", "prefill"]
        assert received(status) > received(before)
        split.wait(lambda s: logged_bytes(split) == received(s), "every byte in the event log")
        return any(0 < result.usage.layers_helped < SPEC.layers for result in results)

    assert caught(once)


def stop_while_busy(split: Rig, answers: dict, role: str) -> tuple[int, Burst]:
    """A burst, in which the process of an instance of this role stops while it has requests. → its number, and the burst."""
    for _ in range(10):
        victim = worker(split, role)
        results = Burst(split, answers)
        split.wait(lambda s: held(s, victim) > 0 or results.over, f"at {role}")
        split.cluster.signal_worker(victim, signal.SIGSTOP)
        for _ in range(10):  # what it said before is heard
            time.sleep(0.03)
            status = split.client.status()
        if held(status, victim) > 0:
            return victim, results
        split.cluster.signal_worker(victim, signal.SIGCONT)
        results()
    raise AssertionError(f"every burst was over before the {role} instance could be stopped")


def kill_while_busy(split: Rig, answers: dict, role: str) -> tuple[str, Burst]:
    """The same, and then it dies. → its name, and the burst."""
    victim, results = stop_while_busy(split, answers, role)
    split.cluster.signal_worker(victim)
    return f"i{victim}", results


def decoding(status: pb.ClusterStatus) -> set[str]:
    return {i.id for i in status.instances if i.role == "decode" and i.phase == "serving"}


def held(status: pb.ClusterStatus, victim: int) -> int:
    return next(i.waiting + i.running for i in status.instances if i.id == f"i{victim}")


def again(results: list[Result]) -> bool:
    """Some ran again: what the instance had was there, not only on its way to it."""
    return any(result.usage.attempts > 1 for result in results)


def test_the_decode_instance_dies(split: Rig, answers) -> None:
    """With two instances for prompts, one of them takes its place, with the KV that it has."""
    def once() -> bool:
        settle(split, 2)
        prefill = {i.id for i in split.client.status().instances if i.phase == "serving" and i.role == "prefill"}
        victim, results = kill_while_busy(split, answers, "decode")
        status = split.wait(lambda s: decoding(s) - {victim}, "another decode instance")
        assert decoding(status) & prefill, "nobody mutated"
        return again(results())

    assert caught(once)
    settle(split, 2)


def test_a_decode_instance_that_hangs_is_left_behind(split: Rig, answers) -> None:
    """It neither answers nor closes its sockets: its requests run again elsewhere, and nobody waits for it."""
    def once() -> bool:
        settle(split, 2)
        before = split.pids()
        hung, results = stop_while_busy(split, answers, "decode")
        status = split.wait(lambda s: decoding(s) - {f"i{hung}"}, "another decode instance", 100)
        assert next(i.phase for i in status.instances if i.id == f"i{hung}") == "failed"
        got = results()
        assert split.pids() == before, "nobody died, nobody was restarted"
        split.cluster.signal_worker(hung)
        return again(got) and any(result.usage.attempts == 1 for result in got)

    assert caught(once)
    settle(split, 2)


def test_the_prefill_instance_dies(split: Rig, answers) -> None:
    def once() -> bool:
        settle(split, 1)
        _, results = kill_while_busy(split, answers, "prefill")
        return again(results())

    assert caught(once)
    settle(split, 1)
