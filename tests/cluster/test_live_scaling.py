"""The first promise: the tokens of one instance, under every split, at every moment of a scale-up."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from rig import POOL, SPEC, Rig, phases, prompts


@pytest.mark.parametrize("live", ["zigzag", "best_effort", "off"])
@pytest.mark.parametrize("start,target", [(1, 2), (1, 3), (2, 4)])
def test_tokens_are_right_throughout_a_scale_up(rig: Rig, expected, start: int, target: int, live: str) -> None:
    rig.only(start)
    chooser = random.Random(f"{start}{target}{live}")
    rig.scale(target, live=live)
    answers = []
    for prompt in chooser.sample(prompts(48, seed=1), 24):
        answers.append((prompt, rig.send(prompt)))
        time.sleep(chooser.random() * 0.15)
    for prompt, answer in answers:
        assert answer.result().token_ids == expected(prompt)
    rig.settle(target)


def test_loading_instance_helps_before_it_is_whole(rig: Rig, expected) -> None:
    for _ in range(10):  # a busy machine may miss it
        rig.only(1)
        rig.scale(2, live="zigzag")
        rig.wait(lambda s: any(i.phase == "live" and i.layers_loaded for i in s.instances)
                 or phases(s).count("serving") == 2, "live")
        answers = [(p, rig.send(p)) for p in prompts(48, seed=1)[:24]]
        assert all(answer.result().token_ids == expected(prompt) for prompt, answer in answers)
        rig.settle(2)
        if any(0 < answer.result().usage.layers_helped < SPEC.layers for _, answer in answers):
            return
    raise AssertionError("nobody was helped")


def test_sampled_answers_are_the_same_wherever_they_run(rig: Rig) -> None:
    rig.only(1)
    sampled = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234, "max_tokens": 12}
    asked = [(p, sampled | ({"regex": "[a-f]{9}"} if n % 2 else {})) for n, p in enumerate(prompts(12, seed=7))]
    alone = [rig.send(p, **options).result().token_ids for p, options in asked]
    assert all(len(tokens) == 9 and set(tokens) <= set(b"abcdef") for tokens in alone[1::2])
    rig.scale(3, live="zigzag")
    assert [f.result().token_ids for f in [rig.send(p, **options) for p, options in asked]] == alone
    rig.settle(3)


def test_scale_up_from_disk(rig: Rig, expected) -> None:
    rig.only(1)
    rig.scale(2, source="disk", live="zigzag")
    answers = [(p, rig.send(p)) for p in prompts(48, seed=1)[:8]]
    assert all(answer.result().token_ids == expected(prompt) for prompt, answer in answers)
    rig.settle(2)


def test_scale_down_finishes_what_runs(rig: Rig, expected) -> None:
    for _ in range(5):
        rig.only(3)
        stream = rig.client.stream(prompts(1, seed=5)[0][:12], n=12, temperature=1.0, max_tokens=220, ignore_eos=True)
        begun = next(stream)  # all twelve run: one after the other, the first would end before the last has begun
        rig.scale(1)
        draining = phases(rig.client.status()).count("draining")
        tokens = Counter()
        for chunk in (begun, *stream):
            tokens[chunk.index] += len(chunk.token_ids)
        assert tokens == dict.fromkeys(range(12), 220)
        rig.settle(1)
        if draining == 2:
            return
    raise AssertionError("every time an instance was done before it could drain")


def test_cancelled_requests_free_their_pages(rig: Rig) -> None:
    rig.only(1)
    rig.scale(2, live="zigzag")
    streams = [rig.client.stream(p, max_tokens=100, ignore_eos=True) for p in prompts(8, seed=9)]
    for stream in streams:
        next(stream)
        stream.close()
    rig.settle(2)
    assert POOL == len(rig.client.status().instances)
