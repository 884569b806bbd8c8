"""Gemma 3's text decoder (arXiv:2503.19786): Gemma 2 with normed heads instead of caps, five windows to one global
layer, and a shorter rope for the windows."""

from __future__ import annotations

from blitzjax.models import gemma2
from blitzjax.models.config import Config, typed
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option

# The text_config of a model with a vision tower lists only what it has otherwise.
DEFAULTS = gemma2.DEFAULTS | {
    "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "vocab_size": 262208, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 131072}


def options(config: Config) -> dict[str, Option]:
    config.only("attn_logit_softcapping", instead="null")  # transformers reads it and does without
    return gemma2.options(config) | {"qk_norm": "head", "sliding_rope_theta": _sliding_theta(config)}


def _sliding_theta(config: Config) -> float:
    by_type = config.get("rope_parameters", {}).get("sliding_attention", {})
    Config(by_type).only("rope_type", "default")
    return float(by_type.get("rope_theta") or config.need("rope_local_base_freq"))


def layer_kinds(config: Config) -> tuple[str, ...]:
    return typed(config, default=lambda layer: (layer + 1) % config.get("sliding_window_pattern", 6) != 0)


FAMILY = decoder_family("gemma3", options, layer_kinds=layer_kinds, defaults=DEFAULTS, names_table=gemma2.NAMES)
