"""Numbers of the scale-up bench: order statistics, comparison of answers, and the ideal that a run is held against."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.control import live_sim

Number = TypeVar("Number", float, float | None)
NEAR_TIE_MARGIN = 1e-3  # between the two largest float32 logits of the reference: rounding may decide such a step


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that `percent` % of the values do not exceed."""
    assert values and 0 < percent <= 100
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def median_of(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Key by key over rounds; None where no round has a value."""
    keys = rows[0] if rows else ()
    found = {key: [value for row in rows if (value := row[key]) is not None] for key in keys}
    return {key: rounded(statistics.median(values)) if values else None for key, values in found.items()}


def rounded(value: float) -> float:
    """Four significant digits are more than any measurement here has."""
    return float(f"{value:.4g}")


def rounded_row(row: Mapping[str, Number]) -> dict[str, Number]:
    return {key: None if value is None else rounded(value) for key, value in row.items()}


def ttft(values_s: Sequence[float]) -> dict[str, float]:
    return {"ttft_mean_s": statistics.fmean(values_s), "ttft_p50_s": statistics.median(values_s),
            "ttft_p95_s": percentile(values_s, 95), "ttft_max_s": max(values_s)}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer leaves the reference. `margin` is the reference's top-2 logit margin at that step."""

    prompt: int
    step: int
    expected: tuple[int, ...]
    got: tuple[int, ...]
    margin: float | None = None  # None: not a matter of logits, the answer was too short, too long or absent

    @property
    def near_tie(self) -> bool:
        return self.margin is not None and self.margin < NEAR_TIE_MARGIN


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first differing token, the shorter length if one is a prefix of the other, None if equal."""
    if tuple(expected) == tuple(got):
        return None
    pairs = zip(expected, got, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))


@dataclass(frozen=True, slots=True)
class Ideal:
    """A scale-up without any overhead. Times in units of one layer's compute for one prompt.

    `embed` is the load time of the embedding, which comes behind the last layer.
    """

    layers: int
    load: float
    prompts: int
    embed: float = 0.0

    def finishes(self, mode: str) -> list[float]:
        """End of every prompt's last layer, mode "zigzag" | "best_effort" | "off" | "none", around the real queue."""
        match mode:
            case "none":
                return live_sim.alone(self.layers, self.prompts)
            case "off":
                return live_sim.stop_the_world(self.layers, self.load, self.prompts, self.load, self.embed)
            case _:
                return live_sim.live(mode, self.layers, self.load, self.prompts, self.load, self.embed)

    def first_joint_layers(self, mode: str) -> int | None:
        """Layers on NEW when the first prompt ends that it helped with: the first that OLD pulls after layer 0 came.

        None without a live pair. OLD is then busy with a prompt that it began alone, and layers keep arriving.
        """
        if mode in ("off", "none"):
            return None
        alone = live_sim.alone(self.layers, self.prompts)
        first = next((end for end in self.finishes(mode) if end not in alone), None)
        return None if first is None else max(0, min(self.layers, int(first // self.load)))


def ideal_table(ideal: Ideal, layer_s: float, modes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mode → TTFT in seconds as the ideal has it."""
    out = {}
    for mode in modes:
        times = [end * layer_s for end in ideal.finishes(mode)]
        out[mode] = rounded_row(ttft(times) | {"layers_at_first_joint_token": ideal.first_joint_layers(mode)})
    return out


def ratios(modes: Mapping[str, Mapping[str, float | None]], of: str = "zigzag") -> dict[str, float]:
    """"zigzag/off mean" and so on, for the modes that were run."""
    if of not in modes:
        return {}
    return {f"{of}/{other} {name}": rounded(ours / theirs)
            for other in modes if other != of for name, key in (("mean", "ttft_mean_s"), ("p95", "ttft_p95_s"))
            if (ours := modes[of][key]) is not None and (theirs := modes[other][key]) is not None}


def cpu_s(pid: int | None) -> float:
    """CPU time of a process so far, all its threads. None: it is down."""
    assert pid is not None
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    return f"{os.cpu_count()} cores {platform.machine()} {model}, load {os.getloadavg()[0]:.1f}".replace("  ", " ")
