"""Phi-3 and Phi-4-mini (arXiv:2404.14219): merged projections, partial or LongRoPE rotation (see rope.for_context)."""

from __future__ import annotations

from blitzjax.models.config import Config, windowed
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"qkv": "self_attn.qkv_proj.weight", "gate_up": "mlp.gate_up_proj.weight"})
DEFAULTS = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}


def options(config: Config) -> dict[str, Option]:
    config.only("attention_bias", False)
    return {"activation": config.activation(), "window": config.get("sliding_window", 0)}


FAMILY = decoder_family("phi3", options, layer_kinds=windowed, defaults=DEFAULTS, names_table=NAMES)
