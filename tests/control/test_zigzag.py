"""Numbers of the paper's worked example (figure 15) and of larger ones, through the real queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_sim import alone, live, mean, p95, stop_the_world

from blitzjax.control.zigzag import Handed, LiveQueue, Wait


def test_seven_layers_load_time_six() -> None:
    assert live("zigzag", 7, 6, 7) == [7, 12, 17, 21, 24, 27, 29]
    assert live("best_effort", 7, 6, 7) == [7, 13, 19, 25, 31, 37, 42]


@pytest.mark.parametrize(("layers", "expected"), [
    (32, [(400, 768), (265, 448), (211, 392)]), (80, [(1000, 1920), (665, 1120), (527, 982)])])
def test_larger_cases(layers: int, expected: list[tuple[int, int]]) -> None:
    runs = [alone(layers, 24), stop_the_world(layers, 4, 24), live("zigzag", layers, 4, 24)]
    assert [(round(mean(ends)), max(ends)) for ends in runs] == expected


@pytest.mark.parametrize("delay", [0, 5, 45])
def test_zigzag_beats_best_effort_beats_stop_the_world(delay: float) -> None:
    ends = [live("zigzag", 30, 5, 24, delay), live("best_effort", 30, 5, 24, delay), stop_the_world(30, 5, 24, delay),
            alone(30, 24)]
    assert [mean(e) for e in ends] == sorted(mean(e) for e in ends)
    assert p95(ends[0]) < p95(ends[2])


@given(st.sampled_from(["zigzag", "best_effort"]), st.integers(1, 9), st.integers(1, 8), st.integers(0, 9),
       st.integers(0, 30))
def test_every_batch_ends_and_never_later_than_alone(mode: str, layers: int, load: int, batches: int,
                                                     delay: int) -> None:
    ends = live(mode, layers, load, batches, delay)
    assert max(ends, default=0) <= layers * batches + batches  # at most one layer of waiting for each hand-over


def queue(mode: str = "zigzag", loaded: int = 0, items: str = "abc", layers: int = 4) -> LiveQueue[str]:
    q: LiveQueue[str] = LiveQueue(layers, mode)
    q.loaded(loaded)
    for item in items:
        q.add(item)
    return q


@pytest.mark.parametrize("mode", ["zigzag", "best_effort"])
def test_without_layers_old_gets_whole_items(mode: str) -> None:
    q = queue(mode)
    assert q.next() is None
    assert q.pull() == Handed("a", 0) and q.items == ("b", "c")


def test_new_returns_to_the_oldest_item_when_a_layer_arrives() -> None:
    q = queue(loaded=1)
    assert q.next() == ("a", 0)
    q.ran("a")
    assert q.next() == ("b", 0)
    q.loaded(2)
    q.ran("b")
    assert q.next() == ("a", 1)


def test_old_waits_while_new_is_inside_a_layer_of_the_oldest() -> None:
    q = queue(loaded=1)
    q.next()
    assert q.pull() == Wait()
    q.ran("a")
    assert q.pull() == Handed("a", 1)


def test_best_effort_visits_an_item_once_and_runs_at_most_half() -> None:
    q = queue("best_effort", loaded=3, items="a")
    for layer in (0, 1):
        assert q.next() == ("a", layer) and q.pull() == Wait()
        q.ran("a")
    assert q.next() is None and q.pull() == Handed("a", 2)


def test_once_loaded_old_gets_later_items_and_new_keeps_the_head() -> None:
    q = queue(loaded=4)
    assert q.next() == ("a", 0)
    assert q.pull() == Handed("b", 0) and not q.drained
    assert q.pull() == Handed("c", 0) and q.pull() is None and q.drained
    assert [q.ran("a") or q.next() for _ in range(4)] == [("a", 1), ("a", 2), ("a", 3), True]
    assert len(q) == 0


def test_best_effort_once_loaded_shares_the_rest() -> None:
    q = queue("best_effort", loaded=1)
    for item in "abc":
        assert q.next() == (item, 0)
        q.ran(item)
    q.loaded(4)
    assert q.next() == ("b", 1)  # a had its share: it is OLD's next one
    assert q.pull() == Handed("a", 1) and q.pull() == Handed("c", 1)
    assert q.pull() is None and q.drained


def test_an_empty_queue_is_drained_only_once_loaded() -> None:
    q = queue(items="")
    assert q.pull() is None and not q.drained
    q.loaded(4)
    assert q.drained


@pytest.mark.parametrize("mode", ["zigzag", "best_effort"])
def test_a_closed_queue_gives_nothing_and_new_finishes_alone(mode: str) -> None:
    q = queue(mode, loaded=1)
    q.next(), q.ran("a")
    q.close()
    assert q.pull() is None
    q.loaded(4)
    left = []
    while (step := q.next()) is not None:
        if q.ran(step[0]):
            left.append(step[0])
    assert left == ["a", "b", "c"]


def test_removed_items_leave_even_in_the_middle_of_a_layer() -> None:
    q = queue(loaded=4)
    assert q.next() == ("a", 0)
    q.remove("a")
    q.remove("unknown")
    assert not q.ran("a") and "a" not in q and q.next() == ("b", 0)


def test_new_runs_only_what_is_ready_and_old_may_pull_anything() -> None:
    for mode in ("zigzag", "best_effort"):
        q: LiveQueue[str] = LiveQueue(4, mode)
        q.loaded(2)
        q.add("a", ready=False)
        q.add("b")
        assert q.next() == ("b", 0) and not q.ran("b")
        q.ready("a")
        assert q.next() == ("a", 0) and not q.ran("a")
        q.add("c", ready=False)
        q.loaded(4)
        q.remove("a")
        q.remove("b")
        assert q.pull() == Handed("c", 0)


def test_a_late_item_of_low_rank_is_older_than_what_is_queued() -> None:
    q: LiveQueue[str] = LiveQueue(4, "zigzag")
    for item, rank in (("b", (0, 2.0)), ("c", (0, 3.0)), ("a", (0, 1.0)), ("c2", (0, 3.0)), ("urgent", (-1, 9.0))):
        q.add(item, rank=rank)
    assert q.items == ("urgent", "a", "b", "c", "c2")
