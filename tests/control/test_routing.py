from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control.routing import Router, Seat
from blitzjax.types import InstanceId, Phase, Request

A = Seat("a", Phase.SERVING, free_slots=2, free_pages=10, page_size=16, backlog_tokens=0)
B = A._replace(instance="b")
REQUEST = Request("r", "toy", prompt_tokens=40, max_tokens=24, arrival_s=0.0)  # 4 pages


def to(*seats: Seat, request: Request = REQUEST) -> InstanceId | None:
    router = Router(serving_tokens=100, live_tokens=200)
    for seat in seats:
        router.update(seat)
    return router.choose(request)


def test_the_least_backlog_wins_then_the_fewest_running_then_the_id() -> None:
    assert to(B, A) == "a"
    assert to(A._replace(backlog_tokens=10), B) == "b"
    assert to(A, B._replace(free_slots=3)) == "b"
    assert to(A._replace(backlog_tokens=10), B._replace(free_slots=1)) == "b"


def test_no_room_no_request() -> None:
    assert to() is None
    assert to(A._replace(free_slots=0), B._replace(free_pages=3)) is None
    assert to(A._replace(free_pages=4)) == "a"


def test_a_backlog_of_two_steps_is_enough() -> None:
    assert to(A._replace(backlog_tokens=99)) == "a"
    assert to(A._replace(backlog_tokens=100)) is None


def test_only_serving_and_live_instances_take_requests() -> None:
    taking = [p for p in Phase if to(A._replace(phase=p)) == "a"]
    assert taking == [Phase.LIVE, Phase.SERVING]


def test_new_takes_what_its_redirected_partner_does_not() -> None:
    old, new = A._replace(redirected=True), B._replace(phase=Phase.LIVE)
    assert to(old) is None
    assert to(old, new._replace(backlog_tokens=160)) == "b"
    assert to(old, new._replace(backlog_tokens=161)) is None
    huge = replace(REQUEST, prompt_tokens=1000, max_tokens=1)
    assert to(new._replace(free_pages=100), request=huge) == "b"  # any request when it has nothing else


def test_complete_instances_go_first_when_equally_busy() -> None:
    assert to(A._replace(phase=Phase.LIVE), B) == "b"


SEATS = st.builds(Seat, st.sampled_from("abcd"), st.sampled_from([Phase.SERVING, Phase.LIVE, Phase.DRAINING]),
                  st.integers(0, 2), st.integers(0, 8), st.just(16), st.integers(0, 25).map(lambda k: 10 * k),
                  st.booleans())
ASKS = st.builds(Request, st.sampled_from("xyz"), st.just("toy"), st.integers(1, 120), st.just(8), st.just(0.0))


@given(st.lists(SEATS | ASKS, max_size=40))
def test_a_router_that_only_hears_of_changes_chooses_as_one_that_sees_everything(steps: list[Seat | Request]) -> None:
    router, seats = Router(serving_tokens=100, live_tokens=200), {}
    for step in steps:
        if isinstance(step, Seat):
            seats[step.instance] = step
            router.update(step)
        else:
            assert router.choose(step) == to(*seats.values(), request=step)
