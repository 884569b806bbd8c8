"""Draws rounds side by side: offered load, layers loaded, TTFT of each request; one column a round, shared axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from launch.burst import Answer, Round  # noqa: E402
from launch.report import layers_over_time, outstanding, summarize  # noqa: E402
from launch.view import NAMES  # noqa: E402

_HELPED, _ALONE, _SHADE, _LOAD = "#d95f02", "#1b6ca8", "#f3e9d2", "#555555"
_INSTANCES = ("#1b6ca8", "#d95f02", "#4d9a51", "#8e5ea2")


def draw(rounds: Sequence[Round], caption: str, folder: Path, name: str = "scale_up") -> list[Path]:
    """Writes FOLDER/NAME.svg and .png; returns both paths."""
    figure, axes = pyplot.subplots(3, len(rounds), figsize=(5.2 * len(rounds), 7.4), sharex=True, sharey="row",
                                   squeeze=False, layout="constrained")
    for column, round_ in enumerate(rounds):
        axes[0, column].set_title(NAMES[round_.mode])
        _draw_load(axes[0, column], round_)
        _draw_layers(axes[1, column], round_)
        _draw_ttft(axes[2, column], round_)
        axes[2, column].set_xlabel("seconds since the burst began")
    axes[2, 0].set_ylim(bottom=0)  # shared, hence after the last column is drawn
    for row, label in enumerate(("requests outstanding", "layers loaded", "TTFT, seconds")):
        axes[row, 0].set_ylabel(label)
    figure.suptitle(caption, fontsize=9)
    paths = [folder / f"{name}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return paths


def _draw_load(axes: Axes, round_: Round) -> None:
    times, counts = outstanding(round_.answers)
    axes.step(times, counts, where="post", color=_LOAD)
    axes.fill_between(times, counts, step="post", color=_LOAD, alpha=0.15)
    _shade(axes, round_)


def _draw_layers(axes: Axes, round_: Round) -> None:
    for k, (instance, (times, layers)) in enumerate(sorted(layers_over_time(round_).items())):
        axes.step(times, layers, where="post", label=instance, color=_INSTANCES[k % len(_INSTANCES)], linewidth=1.8)
    axes.set_ylim(-0.5, round_.layers + 1.5)
    axes.legend(loc="lower right", fontsize=8)
    _shade(axes, round_)


def _draw_ttft(axes: Axes, round_: Round) -> None:
    served = [a for a in round_.answers if a.ttft_s is not None]
    _dots(axes, [a for a in served if not a.layers_helped], _ALONE, "one instance ran all layers")
    _dots(axes, [a for a in served if a.layers_helped], _HELPED, "the loading instance helped")
    mean_s = summarize(round_).ttft_mean_s
    axes.axhline(mean_s, color="black", linestyle=":", linewidth=1, label=f"mean {mean_s:.2f} s")
    axes.legend(loc="upper left", fontsize=8)
    _shade(axes, round_)


def _dots(axes: Axes, answers: Sequence[Answer], colour: str, label: str) -> None:
    """At the moment of the first token."""
    dots = [(a.first_token_s, a.ttft_s) for a in answers if a.first_token_s is not None]
    if dots:
        first_token_s, ttft_s = zip(*dots, strict=True)
        axes.scatter(first_token_s, ttft_s, s=24, color=colour, label=label)


def _shade(axes: Axes, round_: Round) -> None:
    """The scale-up, from the request to the last instance serving."""
    if round_.scale_asked_s is not None and round_.scale_done_s is not None:
        axes.axvspan(round_.scale_asked_s, round_.scale_done_s, color=_SHADE, zorder=0)
