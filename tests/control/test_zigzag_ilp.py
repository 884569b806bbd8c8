"""How far is ZigZag from the best schedule? Against the paper's ILP (section 5.2 of our notes), solved exactly."""

from __future__ import annotations

import pytest

import live_sim

CASES = [(7, 6, 6), (7, 6, 7), (7, 4, 7), (7, 2, 7), (5, 4, 5), (10, 5, 6)]  # layers, load / compute of one, batches


def optimum(layers: int, load: float, batches: int) -> tuple[int, tuple[int, ...]]:
    """The least sum of latencies, and T: how many layers NEW runs of each batch; S = layers - T are OLD's.

        min   sum_r sum_{i<=r} S_i
        C2    sum_{j<=i} T_j <= sum_{j<i} S_j                                   i > 1: OLD never waits for NEW
        C3    load (T_i - 1) <= sum_{j<i} T_j + (N - i + 1) (T_i - 1)           i > 1: layers are there when needed

    C3 is the corrected one, whose clock starts with the first layer. The wait of the first batch is in neither.
    """
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())

    def choose(chosen: tuple[int, ...], new: int, old: int, total: int) -> None:
        """`new` and `old`: layers that either side runs of the batches chosen so far."""
        nonlocal best
        left = batches - len(chosen)
        if total + old * left >= best[0]:
            return
        if not left:
            best = (total, chosen)
            return
        for t in range(layers, -1, -1):
            late = chosen and (new + t > old or load * (t - 1) > new + left * (t - 1))
            if not late:
                choose((*chosen, t), new + t, old + layers - t, total + old + layers - t)

    choose((), 0, 0, 0)
    return int(best[0]), best[1]


@pytest.mark.parametrize(("case", "total"), [((7, 6, 6), 90), ((7, 6, 7), 110)])
def test_optima_are_the_published_ones(case: tuple[int, float, int], total: int) -> None:
    """Figure 15's parameters; for six batches the latencies are 5, 9, 13, 17, 21, 25."""
    found, shares = optimum(*case)
    assert found == total
    assert case[2] == 7 or shares == (2, 3, 3, 3, 3, 3)


@pytest.mark.parametrize("case", CASES)
def test_zigzag_is_within_a_tenth_of_the_optimum_and_best_effort_is_not(case: tuple[int, float, int]) -> None:
    """The optimum counted with the wait for NEW's share of the first batch, in which every batch takes part. ZigZag may
    even be below it, for OLD may run a batch alone or out of turn."""
    layers, load, batches = case
    total, shares = optimum(*case)
    best = total + batches * shares[0]
    assert sum(live_sim.live("zigzag", layers, load, batches)) <= 1.1 * best
    if load > 2:
        assert sum(live_sim.live("best_effort", layers, load, batches)) > 1.05 * best
