"""OLMo 2 (arXiv:2501.00656): norms behind attention and feed-forward instead of in front, and over all query heads."""

from __future__ import annotations

from blitzjax.models.config import Config
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"attn_post_norm": "post_attention_layernorm.weight",
               "ffn_post_norm": "post_feedforward_layernorm.weight"})
DEFAULTS = {"rms_norm_eps": 1e-5}


def options(config: Config) -> dict[str, Option]:
    bias = config.get("attention_bias", False)
    return {"activation": config.activation(), "pre_norm": False, "post_norm": True, "qk_norm": "all",
            "qkv_bias": bias, "o_bias": bias}


FAMILY = decoder_family("olmo2", options, defaults=DEFAULTS, names_table=NAMES)
