"""Qwen2 and Qwen2.5 (arXiv:2412.15115): biases on queries, keys and values; upper layers may see a window only."""

from __future__ import annotations

from blitzjax.models.config import Config, plain, typed
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


DEFAULTS = {"sliding_window": 4096}


def options(config: Config) -> dict[str, Option]:
    return {"activation": config.activation(), "qkv_bias": True, **window(config)}


def window(config: Config) -> dict[str, Option]:
    return {"window": config.get("sliding_window", 0)} if config.get("use_sliding_window") else {}


def layer_kinds(config: Config) -> tuple[str, ...]:
    if not config.get("use_sliding_window"):
        return plain(config)
    return typed(config, default=lambda layer: layer >= config.get("max_window_layers", 28))


FAMILY = decoder_family("qwen2", options, layer_kinds=layer_kinds, defaults=DEFAULTS)
