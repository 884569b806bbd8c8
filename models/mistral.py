"""Mistral (arXiv:2310.06825) and Ministral: llama whose layers, all or some, may see a window only."""

from __future__ import annotations

from blitzjax.models.config import Config, typed
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option

DEFAULTS = {"sliding_window": 4096}


def options(config: Config) -> dict[str, Option]:
    return {"activation": config.activation(), "window": config.get("sliding_window", 0)}


def layer_kinds(config: Config) -> tuple[str, ...]:
    return typed(config, default=lambda _: bool(config.get("sliding_window")))


FAMILY = decoder_family("mistral", options, layer_kinds=layer_kinds, defaults=DEFAULTS)
