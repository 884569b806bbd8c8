"""Qwen3 (arXiv:2505.09388): every query and key head is normed."""

from __future__ import annotations

from blitzjax.models import qwen2
from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.types import Option

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def options(config: Config) -> dict[str, Option]:
    bias = config.get("attention_bias", False)
    return {"activation": config.activation(), "qk_norm": "head", "qkv_bias": bias, "o_bias": bias
            } | qwen2.window(config)


FAMILY = decoder_family("qwen3", options, layer_kinds=qwen2.layer_kinds, defaults=DEFAULTS)
