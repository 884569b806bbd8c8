from __future__ import annotations

from dataclasses import replace

import pytest

from blitzjax.config import ScaleConfig
from blitzjax.control.autoscale import Memory, band, step
from blitzjax.control.load import Load

CONFIG = ScaleConfig(max_instances=8, prefill_tokens_per_s=1000.0, down_after_s=5.0)


def load(n: int, tokens: int = 0, pages: int = 0, at: float = 0.0) -> Load:
    return Load(at, n, tokens, pages, 100)


@pytest.mark.parametrize(("tokens", "pages", "expected"), [
    (0, 0, (0, 0)), (700, 0, (1, 2)), (701, 0, (2, 2)), (2100, 0, (3, 5)), (0, 95, (1, 2)), (0, 96, (2, 2)),
    (700, 190, (2, 3))])
def test_band_of_backlog_and_pages(tokens: int, pages: int, expected: tuple[int, int]) -> None:
    assert band(load(1, tokens, pages), CONFIG) == expected


@pytest.mark.parametrize(("n", "tokens", "target"), [
    (1, 700, 1),    # exactly the upper bound of one instance
    (1, 701, 2), (1, 2100, 4),  # midpoint of [3, 5]
    (2, 4200, 8),   # midpoint of [6, 9], rounded up
    (3, 2100, 3), (5, 2100, 5), (1, 50_000, 8), (0, 0, 1)])
def test_up_to_the_middle_of_the_band_at_once(n: int, tokens: int, target: int) -> None:
    assert step(load(n, tokens), Memory(), CONFIG) == (target, Memory())


def test_down_one_by_one_after_the_load_was_low_for_long_enough() -> None:
    memory, targets, n = Memory(), [], 3
    for second in range(18):
        n, memory = step(load(n, at=float(second)), memory, CONFIG)
        targets.append(n)
    assert targets == [3] * 5 + [2] * 5 + [1] * 8


def test_a_burst_in_between_starts_the_wait_again() -> None:
    _, memory = step(load(2, at=0.0), Memory(), CONFIG)
    assert memory == Memory(0.0)
    target, memory = step(load(2, tokens=1000, at=4.0), memory, CONFIG)
    assert (target, memory) == (2, Memory())
    assert step(load(2, at=6.0), memory, CONFIG) == (2, Memory(6.0))
    assert step(load(2, at=11.0), Memory(6.0), CONFIG)[0] == 1


def test_a_forecast_follows_the_growth_of_the_backlog_and_nothing_else() -> None:
    config = replace(CONFIG, forecast_s=0.2)
    assert step(load(1, 400, at=9.0), Memory(), config)[0] == 1  # the first look has no past
    memory = Memory()
    for at, tokens, target in [(0.0, 200, 1), (0.1, 300, 1), (0.2, 460, 2), (0.3, 460, 1), (0.5, 460, 1), (0.6, 0, 1)]:
        # at 0.2: 460 and what came since 0.0 make 720; at 0.3: 460 and what came since 0.1 make 620
        got, memory = step(load(1, tokens, at=at), memory, config)
        assert got == target, at
    assert [at for at, _ in memory.backlogs] == [0.5, 0.6]
