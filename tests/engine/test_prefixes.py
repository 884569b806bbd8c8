"""Prefix-cache hits and preemption change when tokens come, never which: whatever is shared, evicted or run again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from blitzjax.config import EngineConfig
from blitzjax.control.batching import Batcher
from blitzjax.engine import messages as m
from blitzjax.engine.decoding import DecodeBatch
from blitzjax.engine.prefixes import PrefixCache, kept_pages
from blitzjax.engine.stages import Stages
from blitzjax.commands import Abort, EndLive, Release, StartLive
from blitzjax.events import Drained, LiveDrained, PrefillDone, RequestHanded
from blitzjax.types import LivePair, Work
from test_instance import (LETTERS, PATIENT, PENALISED, SPEC, Rig, answers, depth, finished, messages, reference, wait,
                           work)

ENGINE = EngineConfig(dtype="float32", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64)
NUMBERS = itertools.count(100)


@pytest.fixture
def rig_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Rig]]:
    cache = str(tmp_path_factory.getbasetemp() / "executables")
    made: dict[str, Rig] = {}

    def make(name: str = "one", own_memory: bool = False, **knobs: object) -> Rig:
        config = replace(PATIENT, engine=replace(ENGINE, executable_cache=cache, **knobs))
        made[name] = Rig(name, config, made, own_memory=own_memory)
        return made[name]

    yield make
    for rig in made.values():
        rig.stop()


def asking(prompt: tuple[int, ...], **sampling: object) -> Work:
    """A request under a name of its own."""
    item = work(next(NUMBERS), len(prompt), **{"max_tokens": 12, "ignore_eos": True, **sampling})
    return replace(item, prompt=prompt)


def tokens_of(number: int, count: int) -> tuple[int, ...]:
    return work(number, count).prompt


def told(rig: Rig, item: Work) -> tuple[list[int], int]:
    """The answer, and how much of the prompt was cached."""
    said = messages(rig, item)
    return [t for one in said for t in one.token_ids], said[0].cached_tokens


@pytest.mark.parametrize("sampling", [{}, PENALISED, {"temperature": 0.8, "seed": 3, "logprobs": 2}])
def test_a_hit_gives_the_tokens_of_the_whole_prompt(rig_of, sampling: dict[str, object]) -> None:
    plain, cached = rig_of("plain", prefix_caching=False), rig_of("cached")
    for rig in (plain, cached):
        rig.load(SPEC.units)
    shared = tokens_of(1, 150)
    hits = []
    for number, (common, own) in enumerate([(150, 5), (150, 30), (64, 200), (40, 3), (150, 0), (128, 0), (31, 4)]):
        item = asking(shared[:common] + tokens_of(10 + number, own) if own else shared[:common], **sampling)
        expected, none = told(plain, item)
        got, hit = told(cached, item)
        assert got == expected and none == 0
        hits.append(hit)
    assert hits == [0, 128, 64, 32, 128, 96, 0], "full pages, in multiples of the narrowest chunk, but the last token's"


@pytest.mark.parametrize("own_memory", [False, True])
def test_the_next_turn_of_a_conversation_hits_what_was_answered(rig_of, own_memory: bool) -> None:
    plain, cached = rig_of("plain", prefix_caching=False), rig_of("cached", own_memory)
    for rig in (plain, cached):
        rig.load(SPEC.units)
    talk, hits = tokens_of(2, 50), []
    for turn in range(4):
        item = asking(talk, max_tokens=40)
        answer, hit = told(cached, item)
        assert answer == told(plain, item)[0]
        hits.append((hit, len(talk)))
        talk += tuple(answer) + tokens_of(20 + turn, 9)
    assert hits == [(0, 50), (64, 99), (128, 148), (160, 197)]


def test_answers_go_on_while_pages_are_copied_off_a_device(rig_of, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cached = rig_of("plain", prefix_caching=False), rig_of("cached", own_memory=True)
    for rig in (plain, cached):
        rig.load(SPEC.units)
    copying, cut = threading.Event(), PrefixCache._cut
    monkeypatch.setattr(PrefixCache, "_cut", lambda self, *args: (copying.wait(300), cut(self, *args)))
    first = asking(tokens_of(6, 100), max_tokens=40)
    expected = told(plain, first)[0]
    assert told(cached, first) == (expected, 0) and not copying.is_set()
    again = asking(first.prompt + tuple(expected), max_tokens=40)
    cached.post(again)
    time.sleep(0.1)  # it has nothing to begin with
    assert again.request.id not in answers(cached)
    copying.set()
    cached.wait(lambda events: again.request.id in finished(events), "an answer")
    assert answers(cached)[again.request.id] == told(plain, again)[0]
    assert messages(cached, replace(again, request=replace(again.request, id="hit")))[0].cached_tokens == 128


def test_a_sharded_instance_hits_too(rig_of) -> None:
    plain, sharded = rig_of("plain", prefix_caching=False), rig_of("sharded", tensor_parallel=2)
    for rig in (plain, sharded):
        rig.load(SPEC.units)
    first = asking(tokens_of(3, 70), max_tokens=40)
    answer, hits = told(plain, first)[0], []
    for prompt in (first.prompt, first.prompt + tokens_of(4, 9), first.prompt + tuple(answer)):
        item = asking(prompt, max_tokens=40)
        got, hit = told(sharded, item)
        assert got == told(plain, item)[0]
        hits.append(hit)
    assert hits == [0, 64, 96]


def test_memory_that_runs_out_changes_no_answer(rig_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests of which two or three fit: those that give way go on later, with the same draws and nothing said twice."""
    samplings = [{}, PENALISED, {"temperature": 0.9, "seed": 5, "top_k": 30}, {"logprobs": 3},
                 {"prompt_logprobs": 1}, {"min_tokens": 30}, LETTERS, {"temperature": 0.7, "seed": 1, "min_p": 0.1}]
    items = [asking(tokens_of(30 + n, 20 + 15 * n), max_tokens=60, **s) for n, s in enumerate(samplings)]
    plain, expected = rig_of("plain", prefix_caching=False), {}
    for item in items:
        expected |= reference(plain, [item])
    preempted: list[str] = []
    preempt = Batcher.preempt
    monkeypatch.setattr(Batcher, "preempt", lambda self, i, *args: (preempted.append(i), preempt(self, i, *args)))
    make_room = DecodeBatch.make_room
    monkeypatch.setattr(DecodeBatch, "make_room", lambda self, here: (self.check(here), make_room(self, here)))
    for caching in (True, False):
        tight = rig_of(f"tight {caching}", max_num_seqs=4, kv_pages=16, answer_share=0.0, prefix_caching=caching)
        tight.load(SPEC.units)
        preempted.clear()
        tight.post(*items)
        tight.wait(lambda events: len(finished(events)) == len(items), "answers")
        assert answers(tight) == expected and preempted
        assert items[0].request.id not in preempted, "the first always gets on"
        assert sum(isinstance(e, PrefillDone) for e in tight.events) == len(items)
        tight.stop()
        assert tight.instance.idle


def test_lower_priority_values_go_first(rig_of) -> None:
    rig = rig_of(max_num_seqs=1)
    rig.load(SPEC.units)
    items = [asking(tokens_of(50 + n, 30), max_tokens=20) for n in range(4)]
    ranked = [replace(item, request=replace(item.request, priority=p)) for item, p in zip(items, (0, 2, 1, -1), strict=True)]
    rig.acts[items[0].request.id] = (1, lambda: rig.post(*ranked[1:]))
    rig.post(ranked[0])
    rig.wait(lambda events: len(finished(events)) == 4, "answers")
    begun = [e.request_id for e in rig.events if isinstance(e, PrefillDone)]
    assert begun == [items[n].request.id for n in (0, 3, 2, 1)]


def test_a_prompt_whose_logprobs_are_wanted_is_run_whole(rig_of) -> None:
    rig = rig_of()
    rig.load(SPEC.units)
    item = asking(tokens_of(5, 100), prompt_logprobs=2, max_tokens=3)
    first = messages(rig, item)
    again = messages(rig, replace(item, request=replace(item.request, id="again")))
    assert again[0].cached_tokens == 0 and again[0].prompt_logprobs == first[0].prompt_logprobs
    assert told(rig, asking(item.prompt, max_tokens=3)) == ([t.token_ids[0] for t in first], 96), "others may hit it"


def test_other_parameters_never_meet_old_pages(rig_of) -> None:
    rig = rig_of()
    rig.load(SPEC.units)
    item = asking(tokens_of(6, 100), max_tokens=3)
    assert told(rig, item)[1] == 0 and told(rig, item)[1] == 96
    rig.instance.post(Release("one"))
    rig.wait(lambda events: any(isinstance(e, Drained) for e in events), "Drained")
    rig.load(SPEC.units)
    assert told(rig, item)[1] == 0


def test_an_aborted_prompt_leaves_the_cache_whole(rig_of) -> None:
    rig = rig_of(kv_pages=40)
    rig.load(SPEC.units)
    for number in range(6):
        item = asking(tokens_of(7, 300), max_tokens=100)
        abort = Abort("one", item.request.id)
        if number % 2 == 0:
            rig.acts[item.request.id] = (1, lambda abort=abort: rig.post(abort))
        rig.instance.post(item)
        if number % 2:
            rig.instance.post(abort)
        rig.wait(lambda events, i=item: i.request.id in finished(events), "the abort")
        rig.instance.check()
    assert rig.instance.idle


def test_what_a_live_pair_has_split_may_be_hit_afterwards(rig_of) -> None:
    plain, old, new = rig_of("plain", prefix_caching=False), rig_of("old"), rig_of("new")
    items = [asking(tokens_of(60 + n, 70 + n)) for n in range(4)]
    expected = reference(plain, items)
    old.load(SPEC.units)
    new.load(SPEC.units - 1)  # all but the head
    pair = LivePair("old", "new", "zigzag")
    new.post(StartLive("new", pair), *items)
    wait(lambda: all(depth(new, i) == SPEC.layers - 1 for i in items), "NEW's layers of every prompt")
    old.instance.post(StartLive("old", pair))
    old.wait(lambda events: finished(events) >= {i.request.id for i in items}, "answers")
    assert answers(old) == expected and any(e.layers_helped for e in old.events if isinstance(e, m.Tokens))
    new.load(SPEC.units)
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    for rig in (old, new):
        rig.instance.post(EndLive(rig.instance.name, pair))
    handed = {e.request_id for e in new.events if isinstance(e, RequestHanded)}
    assert handed == {i.request.id for i in items}
    with old.changed:
        old.events.clear()
    for item in items:
        assert told(old, asking(item.prompt)) == (expected[item.request.id], 64)


def test_nothing_compiles_once_everything_was_compiled(rig_of) -> None:
    rig = rig_of(max_num_seqs=2, max_model_len=256, kv_pages=20, answer_share=0.0)
    rig.load(SPEC.units)
    stages = rig.instance.runner.stages
    stages.compile_all()
    known = len(stages._found)
    items = [asking(tokens_of(8, size), max_tokens=40) for size in (150, 40, 200, 97, 180, 129)]
    rig.post(*items)
    rig.wait(lambda events: len(finished(events)) == len(items), "answers")
    assert len(stages._found) == known


def test_the_cache_is_bounded_by_pages_and_by_bytes(rig_of) -> None:
    stages: Stages = rig_of().instance.runner.stages
    page_bytes = SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 16 * 4
    for knobs, pages in (({}, 100), ({"prefix_cache_bytes": 7 * page_bytes + 1}, 7), ({"prefix_caching": False}, 0)):
        assert kept_pages(stages, replace(ENGINE, **knobs), 100) == pages
