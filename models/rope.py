"""Rotary frequencies as published configs describe them: a base, and factors that divide the frequencies.

Invariant: whatever the scaling is called, a model runs with `rope_theta` and numbers; nothing is computed per sequence,
so a key turns the same way whatever follows it. Configs come in two styles, `rope_parameters` and `rope_theta` with
`rope_scaling`; both are read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from blitzjax.errors import CheckpointError
from blitzjax.types import ModelSpec, Option

if TYPE_CHECKING:
    from blitzjax.models.config import Config

_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings",
         "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "short_factor",
         "long_factor", "low_freq_factor", "high_freq_factor", "finetuned"}


def read_rope(config: Config, head_dim: int) -> tuple[float, dict[str, Option], int]:
    """→ rope_theta, the options of Design that differ from plain rope, the longest sequence in tokens."""
    parameters, max_len = _parameters(config), config.need("max_position_embeddings")
    theta = float(parameters.need("rope_theta"))
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    options: dict[str, Option] = {} if dims == head_dim else {"rope_dims": dims}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", "dynamic"):  # up to max_position_embeddings, where sequences end, they are the same
        return theta, options, max_len
    key = "original_max_position_embeddings"  # of one said twice the outer one holds, as in transformers
    original = config.get(key) or parameters.get(key, max_len)
    frequencies = theta ** -(np.arange(0, dims, 2) / dims)
    scale = parameters.get("attention_factor") or 1.0
    match kind:
        case "linear":
            factors = np.full(dims // 2, float(parameters.need("factor")))
        case "llama3":
            factors = frequencies / _llama3(frequencies, parameters, original)
        case "yarn":
            factors = frequencies / _yarn(frequencies, theta, parameters, original)
            scale = parameters.get("attention_factor") or _yarn_scale(parameters)
            max_len = max(max_len, int(original * parameters.need("factor")))  # model cards add YaRN and leave the other
        case "longrope" | "su":
            factors, longer = (np.asarray(parameters.need(f"{name}_factor"), float) for name in ("short", "long"))
            if not len(factors) == len(longer) == dims // 2:
                raise CheckpointError(f"config.json: {len(factors)} short and {len(longer)} long rope factors for "
                                      f"{dims // 2} pairs of dimensions")
            stretch = parameters.get("factor") or max_len / original
            scale = parameters.get("attention_factor") or math.sqrt(1 + math.log(max(stretch, 1)) / math.log(original))
            if max_len > original:
                options |= {"long_rope_factors": tuple(longer.tolist()), "short_context": original}
        case _:
            raise CheckpointError(f"config.json: rope type {kind!r} is not supported; "
                                  "supported: default, dynamic, linear, llama3, yarn, longrope")
    options["rope_factors"] = tuple(factors.tolist())
    return theta, options | ({} if scale == 1.0 else {"rope_scale": scale}), max_len


def for_context(spec: ModelSpec, tokens: int) -> ModelSpec:
    """The model as it computes where a sequence may have `tokens`: by its long factors, if it has such and the longest
    sequence is beyond the context of the short ones.

    Then they hold for short sequences, too, as in vLLM and llama.cpp: were they chosen by a sequence's own length, all of
    it would have to be run again where it grows beyond, as transformers does.
    """
    options = dict(spec.options)
    short = options.get("short_context")
    if not isinstance(short, int) or min(tokens, spec.max_len) <= short:
        return spec
    options["rope_factors"] = options["long_rope_factors"]
    return replace(spec, options=tuple(sorted(options.items())))


def _parameters(config: Config) -> Config:
    """Those of the rope, from wherever they may be."""
    found = config.get("rope_parameters", {})
    found = found.get("full_attention", found)  # listed by layer type where they differ
    given = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    listed = config.get("rope_scaling") or found
    for key in listed.keys() - _KEYS:
        raise CheckpointError(f"config.json: the rope parameter {key!r} = {listed[key]!r} is not supported; "
                              f"supported: {', '.join(sorted(_KEYS))}")
    known = {"rope_theta": 10000.0} | given | {key: value for key, value in listed.items() if value is not None}
    return replace(config, values=known)


def _llama3(frequencies: np.ndarray, parameters: Config, original: int) -> np.ndarray:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    low, high = parameters.need("low_freq_factor"), parameters.need("high_freq_factor")
    turns = original * frequencies / (2 * math.pi)  # over the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters.need("factor"))


def _yarn(frequencies: np.ndarray, theta: float, parameters: Config, original: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071, 3.2): a ramp over dimensions, its ends rounded outwards unless `truncate` is off."""
    dims = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies * ((1 - ramp) + ramp / parameters.need("factor"))


def _yarn_scale(parameters: Config) -> float:
    factor = parameters.need("factor")

    def at(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return at(parameters.need("mscale")) / at(parameters.need("mscale_all_dim"))
    return at(1.0)
