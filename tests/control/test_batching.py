"""Continuous batching: chunks never depend on load, nothing is lost, doubled or starved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control.batching import Batcher, Chunk, State, Step
from blitzjax.control.blocks import PageLedger
from blitzjax.types import Request


def request(name: str, prompt: int = 8, answer: int = 8, priority: int = 0, arrival_s: float = 0.0) -> Request:
    return Request(name, "toy", prompt, answer, arrival_s, priority)


def batcher(slots: int = 4, chunk: int = 8, pages: int = 64) -> Batcher:
    return Batcher(slots, chunk, PageLedger(pages, 4))


def run_prompt(b: Batcher) -> str:
    """Runs the chunks of the next prompt and emits its first token."""
    while True:
        step = b.next_step()
        assert step is not None
        (chunk,) = step.prefill
        b.chunk_done(chunk)
        after = b.next_step()
        if after is None or not after.prefill or after.prefill[0].request_id != chunk.request_id:
            b.prefilled(chunk.request_id)
            return chunk.request_id


def test_an_empty_batcher_has_no_step() -> None:
    assert batcher().next_step() is None


def test_a_long_prompt_is_cut_at_multiples_of_the_chunk_whatever_decodes() -> None:
    b = batcher()
    for name in "abc":
        b.add(request(name))
        run_prompt(b)
    b.add(request("long", prompt=19))
    chunks = []
    for _ in range(3):
        step = b.next_step()
        assert step.decode == ("a", "b", "c")
        chunks += step.prefill
        b.chunk_done(step.prefill[0])
    assert chunks == [Chunk("long", 0, 8), Chunk("long", 8, 16), Chunk("long", 16, 19)]
    assert b.next_step() == Step(("a", "b", "c"), ())
    b.prefilled("long")
    assert b.next_step() == Step(("a", "b", "c", "long"), ())


def test_the_next_prompt_waits_for_the_chunks_of_the_earlier_one_even_with_priority() -> None:
    b = batcher()
    b.add(request("first", prompt=16))
    b.chunk_done(b.next_step().prefill[0])
    b.add(request("urgent", priority=-5))
    assert b.next_step().prefill == (Chunk("first", 8, 16),)


def test_priority_goes_before_arrival() -> None:
    b = batcher()
    for name, priority in (("a", 0), ("b", -1), ("c", -1)):
        b.add(request(name, priority=priority))
    assert [run_prompt(b) for _ in range(3)] == ["b", "c", "a"]


def test_slots_and_pages_bound_what_runs() -> None:
    b = batcher(slots=2)
    for name in "abc":
        b.add(request(name))
    run_prompt(b), run_prompt(b)
    assert b.next_step() == Step(("a", "b"), ()) and (b.waiting, b.running, b.room) == (1, 2, False)
    b.finish("a")
    assert b.next_step().prefill == (Chunk("c", 0, 8),)
    small = batcher(pages=4)  # 16 tokens
    small.add(request("big", prompt=15, answer=1))
    small.add(request("tiny", prompt=1, answer=1))
    assert small.next_step().prefill[0].request_id == "big"
    small.check()


def test_the_head_is_not_overtaken_by_smaller_requests() -> None:
    b = batcher(pages=6)
    b.add(request("a"))
    run_prompt(b)
    b.add(request("big", prompt=12, answer=8))
    b.add(request("tiny", prompt=1, answer=1))
    assert b.next_step() == Step(("a",), ())
    b.finish("a")
    assert b.next_step().prefill[0].request_id == "big"


def test_replayed_tokens_are_part_of_the_prompt_but_need_no_further_pages() -> None:
    b = batcher(pages=4)
    b.add(request("a", prompt=8, answer=8), prompt_tokens=15)
    assert b.waiting_tokens == 15
    assert b.next_step().prefill == (Chunk("a", 0, 8),)
    b.chunk_done(Chunk("a", 0, 8))
    assert b.next_step().prefill == (Chunk("a", 8, 15),)


def test_held_requests_own_slot_and_pages_but_no_chunk() -> None:
    b = batcher(slots=1)
    assert b.hold(request("h")) and not b.hold(request("x"))
    b.add(request("w"))
    assert b.next_step() is None and (b.held, b.waiting) == (1, 1)
    b.prefilled("h")
    assert b.next_step() == Step(("h",), ())


def test_a_requeued_request_goes_where_it_would_have_gone() -> None:
    b = batcher()
    assert b.hold(request("h", arrival_s=1.0)) and b.hold(request("g", arrival_s=3.0))
    b.add(request("w", arrival_s=2.0))
    b.requeue("g")
    b.requeue("h")
    assert [run_prompt(b) for _ in range(3)] == ["h", "w", "g"]


def test_abort_frees_everything_in_every_state() -> None:
    b = batcher()
    for name in ("decoding", "prefilling", "waiting"):
        b.add(request(name))
    run_prompt(b)
    chunk = b.next_step().prefill[0]
    b.hold(request("held"))
    assert [b.state(n) for n in ("decoding", "prefilling", "held", "waiting")] == [
        State.DECODING, State.PREFILLING, State.HELD, State.WAITING]
    assert all(b.abort(n) for n in ("decoding", "prefilling", "held", "waiting")) and not b.abort("held")
    b.chunk_done(chunk)  # of a request that left meanwhile
    b.check()
    assert b.next_step() is None and b.room and b.waiting_tokens == 0


def test_a_request_that_can_never_fit_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="never fit"):
        batcher(pages=1).add(request("a"))


ARRIVALS = st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2))
OTHERS = st.tuples(st.sampled_from(["hold", "step", "step", "step", "abort", "finish", "requeue", "prefilled"]),
                   st.integers(1, 40), st.integers(1, 12), st.integers(0, 2))


@given(st.lists(st.one_of(ARRIVALS, OTHERS), max_size=60))
def test_nothing_is_lost_doubled_or_starved(steps: list[tuple[str, int, int, int]]) -> None:
    b = Batcher(3, 8, PageLedger(16, 4))  # 64 tokens
    here: dict[str, int] = {}  # → prompt tokens
    done: dict[str, int] = {}

    def step() -> None:
        now = b.next_step()
        for chunk in now.prefill if now else ():
            assert chunk.start == done.setdefault(chunk.request_id, 0) and chunk.start % 8 == 0
            b.chunk_done(chunk)
            done[chunk.request_id] = chunk.stop
            if chunk.stop == here[chunk.request_id]:
                b.prefilled(chunk.request_id)

    for number, (action, prompt, answer, priority) in enumerate(steps):
        name, some = f"r{number}", list(here)[prompt % len(here)] if here else None
        if action == "add":
            b.add(request(name, prompt, answer, priority))
            here[name] = prompt
        elif action == "hold" and b.hold(request(name, prompt, answer, priority)):
            here[name] = prompt
        elif action == "step":
            step()
        elif action in ("abort", "finish") and some is not None:
            assert b.abort(some)
            del here[some]
        elif action in ("requeue", "prefilled") and some is not None and b.state(some) is State.HELD:
            getattr(b, action)(some)
        b.check()
        assert b.waiting + b.running + b.held == len(here)
    for name in [n for n in here if b.state(n) is State.HELD]:
        b.requeue(name)
    for _ in range(6 * len(here)):  # at most five chunks each
        step()
        for name in [n for n in here if b.state(n) is State.DECODING]:
            b.finish(name)
            del here[name]
    assert not here and b.next_step() is None


def test_short_prompts_share_a_step_up_to_the_token_budget() -> None:
    batcher = Batcher(8, 64, PageLedger(100, 16))
    for name, tokens in (("a", 30), ("b", 20), ("c", 20), ("d", 4)):
        batcher.add(Request(name, "m", tokens, 4, 0.0))
    step = batcher.next_step()
    assert [(c.request_id, c.stop) for c in step.prefill] == [("a", 30), ("b", 20)]  # c would make 70, d must not overtake
    assert batcher.next_step() == step  # until the chunks are done
    for chunk in step.prefill:
        batcher.chunk_done(chunk)
        batcher.prefilled(chunk.request_id)
    assert [c.request_id for c in batcher.next_step().prefill] == ["c", "d"]
    batcher.check()
