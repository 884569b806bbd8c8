"""KV memory: pages that are shared, cached and evicted never hold anything else than their key says; when they run out
the last in rank gives way and goes on later; nothing is lost, doubled or starved by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blitzjax.control.batching import Batcher, State
from blitzjax.control.blocks import PageLedger
from blitzjax.control.prefixes import page_keys
from blitzjax.types import PRIORITY_S, Request

PAGE, CHUNK, SLOTS = 4, 8, 3


def test_keys_stand_for_all_tokens_up_to_the_end_of_a_full_page() -> None:
    a, b = page_keys(range(11), PAGE), page_keys([*range(4), 99, *range(5, 12)], PAGE)
    assert len(a) == 2 and len(b) == 3 and a[0] == b[0] and a[1] != b[1]
    assert page_keys([99, *range(5, 12)], PAGE)[1] != b[2], "the page is the same, what is before it is not"
    assert page_keys(range(12), PAGE, a) == page_keys(range(12), PAGE)


def test_idle_pages_are_free_and_the_last_ones_of_the_oldest_prefix_go_first() -> None:
    ledger = PageLedger(4, PAGE, keyed=4)
    old, new = page_keys(range(8), PAGE), page_keys(range(100, 108), PAGE)
    for name, keys in (("old", old), ("new", new)):
        assert ledger.reserve(name, 8) and ledger.remember(name, keys) == (0, 1)
        ledger.release(name)
    assert ledger.free == 4 and len(ledger.find(old)) == len(ledger.find(new)) == 2
    assert ledger.reserve("x", 4) and ledger.forgotten == [old[1]]
    assert len(ledger.find(old)) == 1 and len(ledger.find(new)) == 2
    ledger.check()


def test_a_hit_is_shared_and_takes_no_new_page() -> None:
    ledger = PageLedger(4, PAGE, keyed=4)
    keys = page_keys(range(8), PAGE)
    assert ledger.reserve("a", 12) and ledger.remember("a", keys) == (0, 1)
    assert not ledger.reserve("b", 12) and ledger.reserve("b", 12, ledger.find(keys))
    assert ledger.owned("b")[:2] == ledger.owned("a")[:2] and ledger.free == 0
    ledger.release("a")
    assert ledger.free == 1 and ledger.remember("b", keys) == ()
    ledger.check()


def test_no_more_pages_have_keys_than_there_is_memory_for() -> None:
    ledger = PageLedger(8, PAGE, keyed=3)
    a, b = page_keys(range(8), PAGE), page_keys(range(100, 108), PAGE)
    assert ledger.reserve("a", 8) and ledger.remember("a", a) == (0, 1)
    assert ledger.reserve("b", 8) and ledger.remember("b", b) == (0,), "a's pages are in use"
    ledger.release("a")
    assert ledger.remember("b", b) == (1,) and ledger.forgotten == [a[1]]
    ledger.check()
    none = PageLedger(8, PAGE)
    assert none.reserve("a", 8) and none.remember("a", a) == () and none.find(a) == ()


def test_a_hit_leaves_the_last_token_and_ends_where_stages_can_go_on() -> None:
    for prompt, unit, wanted in ((8, 1, 4), (9, 1, 8), (9, 8, 8), (8, 8, 0), (40, 12, 36), (40, 6, 36)):
        b = Batcher(SLOTS, CHUNK, PageLedger(64, PAGE, keyed=64), hit_tokens=unit)
        keys = page_keys(range(40), PAGE)
        for name in ("a", "b"):
            b.add(Request(name, "toy", prompt, 4, 0.0), keys=keys)
            first = b.next_step().prefill[0].start
            while (step := b.next_step()) is not None and step.prefill:
                b.chunk_done(step.prefill[0])
            b.prefilled(name)
            b.remember(name, keys[: prompt // PAGE])
            b.finish(name)
        assert first == wanted, (prompt, unit)


def test_the_last_in_rank_gives_way_and_goes_on_later() -> None:
    b = Batcher(SLOTS, CHUNK, PageLedger(6, PAGE), answer_share=0.0)
    lengths = {}
    for number, name in enumerate(("first", "urgent", "last")):
        b.add(Request(name, "toy", 7, 12, float(number), -(name == "urgent")))
    for name in ("urgent", "first", "last"):
        b.chunk_done(b.next_step().prefill[0])
        b.prefilled(name)
        lengths[name] = 8
    assert b.victim(lengths) is None and b.next_step().decode == ("urgent", "first", "last")
    lengths = dict.fromkeys(lengths, 9)
    assert b.victim(lengths) == "last"
    b.preempt("last", 9)
    assert b.victim(lengths) is None and b.next_step().decode == ("urgent", "first") and b.waiting_tokens == 9
    b.check()
    b.finish("urgent")
    assert [(c.request_id, c.start, c.stop) for c in b.next_step().prefill] == [("last", 0, 8)]
    lengths |= {"first": 13}
    assert b.victim(lengths) == "last", "which was admitted too early"


@dataclass
class _Sent:
    """What one request got so far."""

    request: Request
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    prefilled: int = 0  # tokens that were run for the prompt now under way

    @property
    def all(self) -> list[int]:
        return self.prompt + self.tokens


class _Engine:
    """An instance without arrays: KV is the list of tokens that it stands for, and the next token is their sum."""

    def __init__(self, pages: int, keyed: int, share: float) -> None:
        self.ledger = PageLedger(pages, PAGE, keyed)
        self.batcher = Batcher(SLOTS, CHUNK, self.ledger, share, hit_tokens=PAGE)
        self.here: dict[str, _Sent] = {}
        self.stored: dict[bytes, tuple[int, ...]] = {}
        self.preemptions = 0
        self.hits = 0

    def add(self, sent: _Sent, held: bool) -> None:
        if held:
            if not self.batcher.hold(sent.request):
                return
        else:
            self.batcher.add(sent.request, keys=page_keys(sent.prompt, PAGE))
        self.here[sent.request.id] = sent

    def remember(self, sent: _Sent, tokens: list[int]) -> None:
        news = self.batcher.remember(sent.request.id, keys := page_keys(tokens, PAGE))
        while self.batcher.forgotten:
            del self.stored[self.batcher.forgotten.pop()]
        for index in news:
            assert keys[index] not in self.stored
            self.stored[keys[index]] = tuple(tokens[: (index + 1) * PAGE])

    def make_room(self) -> None:
        while (victim := self.batcher.victim({i: len(s.all) for i, s in self.here.items()})) is not None:
            sent = self.here[victim]
            running = {i for i in self.here if self.batcher.state(i) in (State.PREFILLING, State.DECODING)}
            ranks = {i: self.here[i].request.rank_s for i in running}
            assert ranks[victim] == max(ranks.values()), "the last in rank gives way"
            done = sent.prefilled if self.batcher.state(victim) is State.PREFILLING else len(sent.all) - 1
            self.remember(sent, sent.all[:done])
            self.batcher.preempt(victim, len(sent.all), page_keys(sent.all, PAGE))
            sent.prefilled = 0
            self.preemptions += 1
            self.batcher.check()

    def step(self) -> None:
        self.make_room()
        waiting = {i for i in self.here if self.batcher.state(i) is State.WAITING}
        now = self.batcher.next_step()
        if now is None:
            return
        begun = {i for i in waiting if self.batcher.state(i) is State.PREFILLING}
        assert all(self.here[a].request.rank_s <= self.here[b].request.rank_s for a in begun for b in waiting - begun)
        for name in now.decode:
            assert len(self.ledger.owned(name)) * PAGE >= len(self.here[name].all), "no page for what it computes"
            self.answer(name)
        for chunk in now.prefill:
            self.run(chunk.request_id, chunk.start, chunk.stop)
            self.batcher.chunk_done(chunk)
            if chunk.stop == len(self.here[chunk.request_id].all):
                sent = self.here[chunk.request_id]
                self.batcher.prefilled(chunk.request_id)
                self.remember(sent, sent.all)
                sent.prefilled = 0
                self.answer(chunk.request_id)

    def run(self, name: str, start: int, stop: int) -> None:
        sent = self.here[name]
        if start != sent.prefilled:
            assert sent.prefilled == 0 and start % PAGE == 0, "only a prompt's beginning is hit"
            for index, key in enumerate(page_keys(sent.all[:start], PAGE)):
                assert self.stored[key] == tuple(sent.all[: (index + 1) * PAGE])
            self.hits += 1
        assert start < stop <= len(sent.all) and stop - start <= CHUNK
        sent.prefilled = stop

    def answer(self, name: str) -> None:
        sent = self.here[name]
        sent.tokens.append(sum(sent.all) % 5)
        if len(sent.tokens) == sent.request.max_tokens:
            self.remember(sent, sent.all[:-1])
            self.batcher.finish(name)
            del self.here[name]

    def check(self) -> None:
        self.batcher.check()
        assert self.stored.keys() == self.batcher.known() | set(self.batcher.forgotten)
        assert self.batcher.waiting + self.batcher.running + self.batcher.held == len(self.here)


ARRIVALS = st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.integers(0, 2))
OTHERS = st.tuples(st.sampled_from(["hold", "step", "step", "step", "abort", "settle"]), st.integers(1, 30),
                   st.integers(1, 12), st.integers(-1, 1), st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(ARRIVALS, OTHERS), max_size=50), st.integers(11, 24), st.integers(0, 24),
       st.sampled_from([0.0, 0.5, 1.0]))
def test_every_request_gets_its_own_answer_once_whatever_memory_there_is(steps, pages: int, keyed: int,
                                                                         share: float) -> None:
    engine, everybody, aborted = _Engine(pages, keyed, share), {}, set()
    for number, (action, size, answer, priority, topic) in enumerate(steps):
        name = f"r{number}"
        held = [i for i in engine.here if engine.batcher.state(i) is State.HELD]
        if action in ("add", "hold"):
            prompt = [topic * 10 + k for k in range(size)]  # alike in all of a topic, but for the length
            sent = _Sent(Request(name, "toy", size, answer, float(number), priority), prompt)
            engine.add(sent, action == "hold")
            everybody |= {name: sent} if name in engine.here else {}
        elif action == "step":
            engine.step()
        elif action == "abort" and engine.here:
            aborted.add(some := list(engine.here)[size % len(engine.here)])
            engine.batcher.abort(some)
            del engine.here[some]
        elif action == "settle" and held:
            if topic:
                engine.batcher.requeue(held[0])
            else:  # its prompt was run elsewhere
                engine.batcher.prefilled(held[0])
                engine.answer(held[0])
        engine.check()
    for name in [i for i in engine.here if engine.batcher.state(i) is State.HELD]:
        engine.batcher.requeue(name)
    for _ in range(40 * len(engine.here)):
        engine.step()
        engine.check()
    assert not engine.here and engine.ledger.free == pages, "somebody starves"
    if share == 1.0:
        assert not engine.preemptions
    for name in everybody.keys() - aborted:
        sent, tokens = everybody[name], list(everybody[name].prompt)
        for _ in range(sent.request.max_tokens):
            tokens.append(sum(tokens) % 5)
        assert sent.all == tokens


def test_memory_that_is_short_by_far_is_shared_in_turns() -> None:
    engine = _Engine(6, 6, 0.0)
    for number in range(6):
        engine.add(_Sent(Request(f"r{number}", "toy", 9, 15, float(number)), [number % 2] * 9), held=False)
    for _ in range(200):
        engine.step()
        engine.check()
    assert not engine.here and engine.preemptions and engine.hits


@pytest.mark.parametrize("ahead", [1, 3])
@settings(deadline=None)
@given(st.lists(st.floats(0.0, 4.0), min_size=10, max_size=400))
def test_a_stream_of_better_priority_overtakes_for_a_bounded_time(ahead: int, gaps: list[float]) -> None:
    """One slot, a request a step; the one that waits is overtaken only by those that came soon after it."""
    b = Batcher(1, CHUNK, PageLedger(8, PAGE))
    b.add(Request("runs", "toy", 1, 2, 0.0))
    b.add(Request("patient", "toy", 1, 2, 0.0, priority=0))
    at, served = 0.0, []
    for number, gap in enumerate(gaps):
        at += gap
        b.add(Request(f"{at} {number}", "toy", 1, 2, at, priority=-ahead))
    while (step := b.next_step()) is not None:
        (chunk,) = step.prefill
        served.append(chunk.request_id)
        b.chunk_done(chunk)
        b.prefilled(chunk.request_id)
        b.finish(chunk.request_id)
    before = served[: served.index("patient")]
    assert all(float(name.split()[0]) <= ahead * PRIORITY_S for name in before if name != "runs")
    after = served[served.index("patient") + 1 :]
    assert all(float(name.split()[0]) >= ahead * PRIORITY_S for name in after if name != "runs")
