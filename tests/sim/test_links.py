from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blitzjax.sim.clock import Clock
from blitzjax.sim.links import Fabric, Flow, Link, max_min


def ends(links: list[Link], flows: list[tuple[float, list[int], float]]) -> list[float]:
    """When each flow of (start, link indices, bytes) has moved everything."""
    clock = Clock()
    fabric = Fabric(clock)
    done = [0.0] * len(flows)
    for k, (start, over, size) in enumerate(flows):
        def finish(mark: int, k: int = k) -> None:
            done[k] = clock.now
        clock.at(start, fabric.begin, [links[i] for i in over], [size], finish)
    clock.run()
    return done


def test_two_flows_in_the_same_direction_share_and_the_rest_speeds_up() -> None:
    out, inn, other = Link("out", 100), Link("in", 100), Link("other", 100)
    # 100 bytes alone until 0.5, then half the rate each: 50 more bytes need a second; the second has 50 left then.
    assert ends([out, inn, other], [(0, [0, 1], 100), (0.5, [0, 2], 100)]) == pytest.approx([1.5, 2.0])
    assert (out.carried, inn.carried, other.carried) == pytest.approx((200, 100, 100))


def test_a_chain_takes_as_long_as_its_slowest_hop_and_opposite_directions_do_not_interfere() -> None:
    fast, slow, back = Link("a", 100), Link("b", 50), Link("back", 100)
    assert ends([fast, slow, back], [(0, [0, 1], 100), (0, [2], 100)]) == pytest.approx([2.0, 1.0])


def test_a_chain_that_crosses_a_link_twice_takes_twice_as_long_and_leaves_as_much_for_others() -> None:
    link = Link("a", 90)
    assert ends([link], [(0, [0, 0], 90), (0, [0], 30)]) == pytest.approx([1 + 60 / 45, 1.0])
    assert link.carried == pytest.approx(210)


def test_marks_are_passed_in_order_at_their_bytes() -> None:
    clock = Clock()
    seen: list[tuple[int, float]] = []
    Fabric(clock).begin([Link("a", 10)], [0, 10, 10, 30], lambda mark: seen.append((mark, clock.now)))
    clock.run()
    assert seen == [(0, 0.0), (1, 1.0), (2, 1.0), (3, 3.0)]


def test_a_stopped_flow_gives_its_share_back() -> None:
    clock = Clock()
    fabric, link, done = Fabric(clock), Link("a", 100), []
    first = fabric.begin([link], [1000], lambda mark: done.append("first"))
    fabric.begin([link], [100], lambda mark: done.append(clock.now))
    clock.at(1.0, fabric.stop, first)
    clock.run()
    assert done == [1.5] and first.moved == 50


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5),
       st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=8))
def test_rates_are_max_min_fair(capacities: list[int], routes: list[list[int]]) -> None:
    links = [Link(str(k), c) for k, c in enumerate(capacities)]
    flows = [Flow(tuple(links[i % len(links)] for i in route), [1.0], lambda mark: None, 0.0) for route in routes]
    for flow in flows:
        for link in flow.links:
            link.flows[flow] = None
    rates = max_min(flows)
    used = {link: sum(rates[f] * f.links.count(link) for f in link.flows) for link in links}
    assert all(used[link] <= link.capacity * (1 + 1e-9) for link in links)
    for flow in flows:  # some full link has nobody faster
        assert any(used[link] >= link.capacity * (1 - 1e-9)
                   and all(rates[f] <= rates[flow] * (1 + 1e-9) for f in link.flows) for link in flow.links)
