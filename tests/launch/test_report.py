"""Summaries, tables, data and picture of the demo. All rounds here are SYNTHETIC: made by hand, never measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from launch import report
from launch.burst import Answer, InstanceSample, Round, Sample, last_helper
from launch.prompts import prompts
from launch.view import helped, ttft_so_far, work_split

pytest.importorskip("matplotlib")

LAYERS = 4


def synthetic_answer(index: int, ttft_s: float, layers_helped: int = 0, tokens: tuple[int, ...] = (1, 2)) -> Answer:
    sent_s = 0.1 * index
    return Answer(index, f"prompt {index}", sent_s, sent_s, sent_s + ttft_s, sent_s + ttft_s + 1.0, "synthetic text",
                  list(tokens), 10, layers_helped, "i1" if layers_helped else "", 1)


def synthetic_sample(at_s: float, phase: str, layers: int, partner: str = "") -> Sample:
    return Sample(at_s, 0, 2, (InstanceSample("i0", "serving", LAYERS, "i1" if partner else "", 1, 0),
                               InstanceSample("i1", phase, layers, partner, 0, 0)))


def synthetic_round(mode: str, ttfts: tuple[float, ...], layers_helped: int = 0) -> Round:
    answers = [synthetic_answer(k, ttft, layers_helped) for k, ttft in enumerate(ttfts)]
    samples = [synthetic_sample(0.0, "idle", 0), synthetic_sample(0.5, "loading", 0),
               synthetic_sample(0.8, "live", 2, "i0"), synthetic_sample(1.5, "serving", LAYERS)]
    return Round(mode, LAYERS, answers, samples, scale_asked_s=0.25, scale_done_s=1.5)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (0.95, 3.85), (1.0, 4.0)])
def test_percentile_is_linear_between_ranks(share: float, expected: float) -> None:
    assert report.percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(report.percentile([], 0.5))


def test_summary_counts_what_the_records_say() -> None:
    summary = report.summarize(synthetic_round("zigzag", (1.0, 2.0, 6.0), layers_helped=2))
    assert (summary.requests, summary.failed, summary.helped) == (3, 0, 3)
    assert summary.ttft_mean_s == pytest.approx(3.0)
    assert summary.ttft_p50_s == pytest.approx(2.0)
    assert summary.ttft_max_s == pytest.approx(6.0)
    assert summary.scale_s == pytest.approx(1.25)
    assert summary.total_s == pytest.approx(7.2)


def test_round_without_answers_has_no_numbers_but_a_summary() -> None:
    empty = Round("off", LAYERS, [Answer(0, "lost", 0.0, error="UNAVAILABLE")])
    summary = report.summarize(empty)
    assert summary.failed == 1 and math.isnan(summary.ttft_mean_s) and math.isnan(summary.scale_s)
    assert empty.failures == ["lost: UNAVAILABLE"]


def test_differing_tokens_are_named() -> None:
    first, second = synthetic_round("zigzag", (1.0, 1.0)), synthetic_round("off", (1.0, 1.0))
    assert report.differing(first, second) == []
    second.answers[1].token_ids[-1] = 99
    assert report.differing(first, second) == ["prompt 1"]
    assert "tokens differ between the rounds in 1 of 2: prompt 1" in report.verdict(first, second)


def test_outstanding_requests_step_up_and_down() -> None:
    times, counts = report.outstanding([synthetic_answer(0, 1.0), synthetic_answer(1, 1.0)])
    assert times == pytest.approx([0.0, 0.0, 0.1, 2.0, 2.1])
    assert counts == [0, 1, 2, 1, 0]


def test_table_and_lines_show_both_modes() -> None:
    console = Console(record=True, width=160)
    console.print(report.table([synthetic_round("zigzag", (1.0, 2.0), 2), synthetic_round("off", (2.0, 3.0))]))
    shown = console.export_text()
    assert "live, ZigZag" in shown and "stop the world" in shown and "2 of 2" in shown


def test_view_says_who_runs_which_layers() -> None:
    samples = synthetic_round("zigzag", (1.0,)).samples
    assert work_split(samples[2], LAYERS) == "i1 runs up to layer 2 of 4, i0 the rest"
    assert work_split(samples[3], LAYERS).startswith("no live pair")
    assert last_helper(samples) == "i1"
    assert helped(synthetic_answer(0, 1.0, layers_helped=2)) == "layers 1-2 on i1"
    assert ttft_so_far([Answer(0, "new", 0.0)]) == "no first token yet"


def test_data_and_picture_are_written(tmp_path: Path) -> None:
    from launch import picture

    rounds = [synthetic_round("zigzag", (1.0, 2.0), 2), synthetic_round("off", (2.0, 3.0))]
    svg, png = picture.draw(rounds, "SYNTHETIC data of a test", tmp_path)
    assert "<svg" in svg.read_text() and png.read_bytes().startswith(b"\x89PNG")
    report.write_json(rounds, {"synthetic": True}, tmp_path / "scale_up.json")
    data = json.loads((tmp_path / "scale_up.json").read_text())
    assert [s["ttft_mean_s"] for s in data["summaries"]] == [1.5, 2.5]
    assert len(data["rounds"]) == 2 and data["rounds"][0]["ttft_s"] == pytest.approx([1.0, 2.0])


def test_prompts_are_distinct_and_mixed() -> None:
    texts = prompts(30)
    assert len(texts) == 30 and len({p.name for p in texts}) == 30
    assert max(len(p.text) for p in texts[:3]) > 10 * min(len(p.text) for p in texts[:3])
