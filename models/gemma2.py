"""Gemma 2 (arXiv:2408.00118): norms on both sides, soft caps, every other layer sees a window only."""

from __future__ import annotations

from blitzjax.models import gemma
from blitzjax.models.config import Config, typed
from blitzjax.models.decoder import decoder_family
from blitzjax.models.names import Names
from blitzjax.types import Option

NAMES = Names({"attn_post_norm": "post_attention_layernorm.weight",
               "ffn_norm": "pre_feedforward_layernorm.weight",
               "ffn_post_norm": "post_feedforward_layernorm.weight"})
DEFAULTS = gemma.DEFAULTS | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
                             "final_logit_softcapping": 30.0}


def options(config: Config) -> dict[str, Option]:
    return gemma.shared(config) | {
        "post_norm": True, "window": config.need("sliding_window"),
        "scale": config.need("query_pre_attn_scalar") ** -0.5, "softcap": config.get("attn_logit_softcapping", 0.0),
        "logit_softcap": config.get("final_logit_softcapping", 0.0)}


def layer_kinds(config: Config) -> tuple[str, ...]:
    return typed(config, default=lambda layer: layer % 2 == 0)


FAMILY = decoder_family("gemma2", options, layer_kinds=layer_kinds, defaults=DEFAULTS, names_table=NAMES)
