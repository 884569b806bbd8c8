"""Clients see what the prefix cache saved them, and the same tokens, wherever an answer runs."""

from __future__ import annotations

import signal

from rig import Rig, prompts


def test_cached_tokens_are_reported_and_change_no_token_while_instances_come(rig: Rig) -> None:
    rig.only(1)
    system = prompts(1, seed=41, longest=0)[0] + [7] * 100
    asked = [system + prompt for prompt in prompts(12, seed=42, longest=40)]
    alone = [rig.send(prompt, prompt_logprobs=0).result() for prompt in asked]  # runs the whole prompt
    assert not any(a.usage.cached_tokens for a in alone)
    rig.scale(3, live="zigzag")
    for expected, answer in zip(alone, [rig.send(prompt) for prompt in asked], strict=True):
        assert answer.result().token_ids == expected.token_ids
    rig.settle(3)
    again = [answer.result() for answer in [rig.send(prompt) for prompt in asked]]
    assert [a.token_ids for a in again] == [a.token_ids for a in alone]
    assert all(a.usage.cached_tokens % 32 == 0 and a.usage.cached_tokens < a.usage.prompt_tokens for a in again)
    rig.only(1)
    last = rig.send(asked[0]).result()
    assert last.usage.cached_tokens == (len(asked[0]) - 1) // 32 * 32 and last.token_ids == alone[0].token_ids


def test_each_prefix_goes_to_the_instance_that_has_it(rig: Rig) -> None:
    rig.only(2)

    def hits() -> dict[str, int]:
        return {i.id: i.prefix_cache_hits for i in rig.client.status().instances}

    for seed in range(20):  # until two that are sent at once go to two instances
        shared = [[seed, k] * 64 for k in (100, 101)]  # 128 tokens
        before = {i.id: i.prefix_cache_queries for i in rig.client.status().instances}
        for answer in [rig.send([*prefix, 1]) for prefix in shared]:
            answer.result()
        asked = {i.id for i in rig.client.status().instances if i.prefix_cache_queries > before[i.id]}
        if len(asked) == 2:
            break
    assert len(asked) == 2
    before = hits()
    answers = [rig.send([*shared[n % 2], 2, n]).result() for n in range(8)]  # nobody is busy
    assert [a.usage.cached_tokens for a in answers] == [128] * 8
    assert {i: n - before[i] for i, n in hits().items() if n > before[i]} == dict.fromkeys(asked, 4 * 128)
    (model,) = rig.client.status().models
    assert model.prefix_cache_hits == sum(hits().values()) <= model.prefix_cache_queries


def test_priorities_order_what_waits(rig: Rig) -> None:
    rig.only(1)
    stopped = rig.index("serving")
    rig.cluster.signal_worker(stopped, signal.SIGSTOP)  # nobody begins before all have come
    busy = [rig.send([n] * 20, max_tokens=200) for n in range(8)]  # every slot
    rig.wait(lambda s: s.running_requests + s.queued_requests == 8, "busy")
    waiting = [rig.send([n] * 20, max_tokens=200, priority=n % 3) for n in range(24)]
    rig.wait(lambda s: s.running_requests + s.queued_requests == 32, "waiting")
    rig.cluster.signal_worker(stopped, signal.SIGCONT)
    priority = {answer.result().request_id: n % 3 for n, answer in enumerate(waiting)}
    told = [(r.get("event") or r.get("command"), r.get("request_id") or r.get("request", {}).get("id") or "")
            for r in rig.whole_log()]
    mine = [(kind, request_id.partition("#")[0]) for kind, request_id in told]
    last = max(n for n, (kind, request_id) in enumerate(mine) if kind == "RequestArrived" and request_id in priority)
    begun = [priority[request_id] for kind, request_id in mine[last:] if kind == "Assign" and request_id in priority]
    assert begun == sorted(begun) and set(begun) == {0, 1, 2}
    assert all(len(answer.result().token_ids) == 200 for answer in busy)
