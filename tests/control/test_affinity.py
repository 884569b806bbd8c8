"""Requests go to where the KV of their beginning probably is, as long as nobody is much busier for that."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control.affinity import Affinity
from blitzjax.control.prefixes import beginnings
from blitzjax.control.routing import Router, Seat
from blitzjax.types import Phase, Request

PAGE = 16
A = Seat("a", Phase.SERVING, free_slots=8, free_pages=100, page_size=PAGE, backlog_tokens=0)
B = A._replace(instance="b")


def request(number: int, shared: int, tokens: int = 128, tail: int = 8) -> Request:
    """Its first `tokens` are those of all with the same `shared`."""
    rng = random.Random(shared)
    prompt = [rng.randrange(1000) for _ in range(tokens)] + [2000 + number] * tail
    return Request(f"r{number}", "toy", len(prompt), 8, 0.0, beginnings=beginnings(prompt, PAGE))


def router(*seats: Seat) -> Router:
    made = Router(serving_tokens=10_000, live_tokens=10_000)
    for seat in seats:
        made.update(seat)
    return made


def test_beginnings_are_equal_as_far_as_the_prompts_are() -> None:
    one, other = beginnings(range(100), PAGE), beginnings([*range(70), *range(30)], PAGE)
    assert len(one) == 3 and len(beginnings(range(15), PAGE)) == 0 and len(beginnings(range(16), PAGE)) == 1
    assert one == other  # 4 pages are equal
    assert beginnings([*range(40), 7, *range(41, 100)], PAGE)[:2] == one[:2]
    assert beginnings([*range(40), 7, *range(41, 100)], PAGE)[2] != one[2]


def test_each_of_two_prefixes_goes_to_where_it_was_first() -> None:
    made = router(A, B)
    first, second = request(0, shared=1), request(1, shared=2)
    made.assigned(first, made.choose(first))
    made.update(A._replace(backlog_tokens=first.prompt_tokens))
    made.assigned(second, made.choose(second))
    made.update(B._replace(backlog_tokens=second.prompt_tokens))
    assert [made.choose(request(n, shared=1 + n % 2)) for n in range(2, 6)] == ["a", "b", "a", "b"]


def test_the_longest_common_beginning_wins() -> None:
    made = router(A, B)
    made.assigned(request(0, shared=1, tokens=16, tail=100), "a")
    made.assigned(request(1, shared=1, tokens=64, tail=100), "b")
    assert made.choose(request(2, shared=1, tokens=128)) == "b"


def test_a_holder_may_be_busier_by_what_the_hit_saves_and_not_by_more() -> None:
    made = router(A, B)
    made.assigned(request(0, shared=1), "b")  # 8 pages in common
    made.update(B._replace(backlog_tokens=8 * PAGE))
    assert made.choose(request(1, shared=1)) == "b"
    made.update(B._replace(backlog_tokens=8 * PAGE + 1))
    assert made.choose(request(1, shared=1)) == "a"
    made.update(B._replace(free_slots=3))
    assert made.choose(request(1, shared=1)) == "a"  # it decodes for many more
    made.update(B._replace(free_pages=1))
    assert made.choose(request(1, shared=1)) == "a"


def test_one_that_dropped_its_parameters_has_nothing() -> None:
    made = router(A, B)
    made.assigned(request(0, shared=1), "b")
    for phase in (Phase.DRAINING, Phase.IDLE, Phase.LOADING, Phase.SERVING):
        made.update(B._replace(phase=phase))
    assert made.choose(request(1, shared=1)) == "a"


def test_requests_with_one_prefix_do_not_leave_the_others_idle() -> None:
    """A burst of one shared prefix, nobody has answered yet: backlogs stay within a prompt of each other."""
    seats = {name: A._replace(instance=name, free_slots=32) for name in "abcd"}
    made, got = router(*seats.values()), Counter()
    for number in range(64):
        asked = request(number, shared=1)
        instance = made.choose(asked)
        made.assigned(asked, instance)
        got[instance] += 1
        seats[instance] = seats[instance]._replace(free_slots=seats[instance].free_slots - 1,
                                                   backlog_tokens=seats[instance].backlog_tokens + asked.prompt_tokens)
        made.update(seats[instance])
        backlogs = [seat.backlog_tokens for seat in seats.values()]
        assert max(backlogs) - min(backlogs) <= 2 * asked.prompt_tokens
    assert max(got.values()) - min(got.values()) <= 2


@given(st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.integers(0, 40), st.booleans()), max_size=60))
def test_what_it_knows_is_what_was_sent_and_not_forgotten(steps: list[tuple[str, int, bool]]) -> None:
    affinity, known = Affinity(), {}
    for instance, name, forgets in steps:
        if forgets:
            affinity.forget(instance)
            for holders in known.values():
                holders.discard(instance)
        else:
            affinity.sent(instance, (name,))
            known.setdefault(name, set()).add(instance)
        for pages, holders in affinity.holders((name,)):
            assert pages == 1 and set(holders) <= known[name]
            assert forgets or holders[-1] == instance
