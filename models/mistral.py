"""Mistral (arXiv:2310.06825): llama whose layers may see a window only."""

from __future__ import annotations

from blitzjax.models.config import Config, windowed
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


def options(config: Config) -> dict[str, Option]:
    return {"activation": config.activation(), "window": config.get("sliding_window", 0)}


FAMILY = decoder_family("mistral", options, layer_kinds=windowed)
