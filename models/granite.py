"""Granite 3 (IBM, 2024): llama with multipliers on embeddings, attention scores, residual branches and logits."""

from __future__ import annotations

from blitzjax.models import llama
from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option


def options(config: Config) -> dict[str, Option]:
    return llama.options(config) | {
        "embed_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "scale": float(config.get("attention_multiplier", 1.0)),
        "logit_scale": 1.0 / config.get("logits_scaling", 1.0)}


FAMILY = decoder_family("granite", options)
