"""What the scale-up bench computes from its measurements, without processes: statistics, comparisons, the ideal."""

from __future__ import annotations

import pytest

from bench import figures
from bench.figures import Difference, Ideal

ISSUE = Ideal(layers=30, load=5, prompts=24)  # the case that the goals were derived from


def test_percentile_is_nearest_rank() -> None:
    values = [float(v) for v in range(24, 0, -1)]
    assert figures.percentile(values, 95) == 23.0
    assert figures.percentile(values, 50) == 12.0
    assert figures.percentile(values, 100) == 24.0
    assert figures.percentile([7.0], 95) == 7.0


def test_ttft_of_a_burst() -> None:
    assert figures.ttft([1.0, 2.0, 3.0, 6.0]) == {
        "ttft_mean_s": 3.0, "ttft_p50_s": 2.5, "ttft_p95_s": 6.0, "ttft_max_s": 6.0}


def test_medians_are_taken_key_by_key_and_skip_what_was_not_seen() -> None:
    rows = [{"a": 1.0, "b": None}, {"a": 3.0, "b": 4.0}, {"a": 100.0, "b": 5.0}]
    assert figures.median_of(rows) == {"a": 3.0, "b": 4.5}
    assert figures.median_of([{"b": None}]) == {"b": None}


@pytest.mark.parametrize(("expected", "got", "step"), [
    ([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 2, 3], 2),
    ([1, 2], [], 0), ([], [], None)])
def test_first_difference(expected: list[int], got: list[int], step: int | None) -> None:
    assert figures.first_difference(expected, got) == step


@pytest.mark.parametrize(("margin", "near"), [(None, False), (0.0, True), (9e-4, True), (1e-3, False), (2.0, False)])
def test_only_a_small_margin_makes_a_near_tie(margin: float | None, near: bool) -> None:
    assert Difference(prompt=0, step=3, expected=(5,), got=(6,), margin=margin).near_tie is near


def test_ideal_of_the_goals() -> None:
    """0.77, 0.85 and 0.54, with the first layer's own load before everything."""
    table = figures.ideal_table(ISSUE, 1.0, ["zigzag", "off", "none"])
    ratio = figures.ratios(table)
    assert 0.75 <= ratio["zigzag/off mean"] <= 0.79
    assert 0.83 <= ratio["zigzag/off p95"] <= 0.87
    assert 0.52 <= ratio["zigzag/none mean"] <= 0.56
    assert table["none"]["ttft_mean_s"] == 375.0


def test_ideal_counts_in_layer_times() -> None:
    fast, slow = (figures.ideal_table(ISSUE, layer_s, ["zigzag"])["zigzag"] for layer_s in (0.01, 0.02))
    assert slow["ttft_mean_s"] == pytest.approx(2 * fast["ttft_mean_s"], rel=1e-3)


def test_a_late_embedding_delays_who_waits_for_all_of_the_model_but_not_a_live_pair() -> None:
    late = Ideal(30, 5, 24, embed=40)
    assert sum(late.finishes("off")) > 1.03 * sum(ISSUE.finishes("off"))
    assert sum(late.finishes("zigzag")) < 1.01 * sum(ISSUE.finishes("zigzag"))
    assert late.finishes("none") == ISSUE.finishes("none")


def test_first_joint_token_comes_long_before_a_quarter_of_the_layers_did() -> None:
    assert 0 < ISSUE.first_joint_layers("zigzag") < 30
    assert ISSUE.first_joint_layers("off") is None
